"""Fill the model's exchange points for a layout: the one place where modules meet process groups."""

from __future__ import annotations

from torch import nn

from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.decoder import Decoder
from megascale.model.layers import SwiGLU
from megascale.model.routers import Router
from megascale.model.routing import Experts, most_is_known
from megascale.model.streams import Aggregator, StreamLinear
from megascale.model.vocabulary import Embedding, Head
from megascale.parallel.collectives import (
    gather,
    gather_rows,
    in_rank_order,
    join_logits,
    join_vocabulary,
    merge,
    scatter,
    share,
    total,
)
from megascale.parallel.context import share_context
from megascale.parallel.expert_exchange import ExpertExchange
from megascale.parallel.mesh import POPULATION, Mesh


def apply(decoder: nn.Module, model: Model, mesh: Mesh, context: str = "all_gather") -> None:
    """Connect the exchange points of a stage, in place. One rank: nothing to connect. `context` is `parallel.context`."""
    if mesh.size("tp") > 1:
        for module in decoder.modules():
            _split_over_tensor_ranks(module, mesh)
    for module in decoder.modules():
        if mesh.size("cp") > 1:
            share_context(module, context, mesh)
        if mesh.size("stream") > 1:
            _split_over_stream_ranks(module, model.streams.count, mesh)
    population = mesh.along(*POPULATION)
    several = len(population) > 1 and model.experts.scope == "global"
    exchange = _expert_exchange(model, mesh)
    for module in decoder.modules():
        if isinstance(module, Router) and several:
            module.population_sum = total(mesh.group(population))
        if isinstance(module, Experts) and several:
            # these ranks count dp slowest and tp fastest, and so do the tokens of a micro-batch (not those of zig-zag chunks, which have
            # no capacity: see `megascale.config.obstacles`)
            module.population_order = in_rank_order(mesh.group(population))
        if isinstance(module, Experts) and exchange is not None:
            module.dispatch, module.receive, module.combine = exchange.dispatch, exchange.receive, exchange.combine


def _expert_exchange(model: Model, mesh: Mesh) -> ExpertExchange | None:
    """None where every rank holds all experts whole."""
    if mesh.size("ep") == mesh.size("etp") == 1:
        return None
    ep = mesh.group(mesh.layout.expert_peers(mesh.world.rank)) if mesh.size("ep") > 1 else None
    etp = mesh.group(mesh.along("tp")) if mesh.size("etp") > 1 else None
    return ExpertExchange(ep, etp, model.experts.capacity_factor)


def describe_dispatch(model: Model, mesh: Mesh) -> str:
    """How copies of tokens come to their experts, for the log."""
    ep, etp, backend = mesh.size("ep"), mesh.size("etp"), mesh.world.device.backend
    over_tensor_ranks = f"gathered over etp {etp} ({backend})"
    if ep > 1:
        counts = "one exchange of counts and one host synchronisation a layer"
        if most_is_known(model):
            counts = "as many rows as the capacity lets pass, no host synchronisation (in evaluation one a layer)"
        return f"all-to-all over ep {ep} ({backend}), {counts}{f', then {over_tensor_ranks}' if etp > 1 else ''}"
    return f"sorted, {over_tensor_ranks if etp > 1 else 'no exchange'}, no host synchronisation"


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
        module.join_logits = join_logits(group, module.vocabulary)


def _split_over_stream_ranks(module: nn.Module, streams: int, mesh: Mesh) -> None:
    """Stream parallelism: every rank takes some of the streams through all layers; they meet in the aggregator, behind which each rank
    goes on with a part of the tokens. For each micro-batch one all-reduce and one reduce-scatter of [T, d], whatever the depth.
    """
    peers = mesh.along("stream")
    group, ranks = mesh.group(peers), len(peers)
    here = streams // ranks
    first = here * peers.index(mesh.world.rank)
    if isinstance(module, StreamLinear):
        module.first_stream, module.merge_streams = first, merge(group)
    elif isinstance(module, Aggregator):
        module.scatter_streams, module.share_streams = scatter(group), share(group)
    elif isinstance(module, Decoder):
        module.streams_here = range(first, first + here)
        # the head sees the parts of all tensor-parallel ranks one after the other
        tensor, name = mesh.size("tp"), group.group_name
        number = peers.index(mesh.world.rank)
        module.share_labels = lambda x: x.view(tensor, ranks, -1)[:, number].flatten()
        module.join_losses = lambda x: gather_rows(x, ranks, name).view(ranks, tensor, -1).transpose(0, 1).flatten()
