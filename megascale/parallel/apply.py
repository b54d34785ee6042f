"""Fill the model's exchange points for a layout. This version: data parallelism."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from megascale.config.schema import Config
from megascale.model.decoder import Decoder
from megascale.model.routing import Router
from megascale.parallel.world import World


def _population_sum(counts: Tensor) -> Tensor:
    """The sum of the ranks' counts, as an op that torch.compile keeps in its graph."""
    world = dist.group.WORLD
    assert world is not None, "more than one rank"
    return functional.all_reduce(counts, "sum", world)


def apply(decoder: Decoder, config: Config, world: World) -> None:
    """Connect the model's exchange points, in place. One rank: nothing to connect."""
    if world.size == 1 or config.model.experts.scope == "rank":
        return
    for module in decoder.modules():
        if isinstance(module, Router):
            module.population_sum = _population_sum
