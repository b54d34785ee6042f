"""Fill the model's exchange points for a layout: the one place where modules meet process groups."""

from __future__ import annotations

from torch import nn

from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.decoder import Decoder
from megascale.model.layers import SwiGLU
from megascale.model.routers import Router
from megascale.model.routing import Experts
from megascale.model.vocabulary import Embedding, Head
from megascale.parallel.collectives import ExpertExchange, gather, in_rank_order, join_vocabulary, scatter, share, total
from megascale.parallel.mesh import STAGE, Mesh


def apply(decoder: nn.Module, model: Model, mesh: Mesh) -> None:
    """Connect the exchange points of a stage, in place. One rank: nothing to connect."""
    if mesh.size("tp") > 1:
        for module in decoder.modules():
            _split_over_tensor_ranks(module, mesh)
    stage = mesh.along(*STAGE)
    several = len(stage) > 1 and model.experts.scope == "global"
    for module in decoder.modules():
        if isinstance(module, Router) and several:
            module.population_sum = total(mesh.group(stage))
        if isinstance(module, Experts) and several:
            # ranks of a stage count dp slowest and tp fastest, and so do the tokens of a micro-batch
            module.population_order = in_rank_order(mesh.group(stage))
        if isinstance(module, Experts) and mesh.size("ep") > 1:
            exchange = ExpertExchange(mesh.group(mesh.layout.expert_peers(mesh.world.rank)))
            module.dispatch, module.combine = exchange.dispatch, exchange.combine


def _split_over_tensor_ranks(module: nn.Module, mesh: Mesh) -> None:
    """Tensor and sequence parallelism (arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2): between the split matrices every rank
    works on its share of the tokens.
    """
    group = mesh.group(mesh.along("tp"))
    if isinstance(module, (Attention, SwiGLU)):
        module.gather_tokens, module.scatter_tokens = gather(group), scatter(group)
    elif isinstance(module, Embedding):
        module.scatter_tokens = scatter(group)
    elif isinstance(module, Decoder):
        module.share_tokens = share(group)
    elif isinstance(module, Head):
        module.gather_tokens, module.join_vocabulary = gather(group), join_vocabulary(group)
