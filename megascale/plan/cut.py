"""Which layers each pipeline stage and rank has, computed once for all layouts that share the cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megascale.config.layout import rank_of_stage, stage_count
from megascale.config.schema import Config, Data, Model, Parallel
from megascale.config.size import routed_layers, strided_layers
from megascale.parallel.stages import stage_layers

LayerKind = tuple[bool, bool, bool]
"""Whether a layer is the model's first, has experts, and computes on every k-th token only."""


@dataclass(frozen=True)
class Cut:
    """A model in pipeline stages."""

    stages: list[range]
    """layers of each stage"""
    counts: list[dict[LayerKind, int]]
    """how many layers of each kind a stage has"""
    by_rank: list[list[int]]
    """stages of each pipeline rank"""
    distinct_ranks: list[int]
    """of the pipeline ranks with the same layers and ends the first and the last: what they keep under way rises or falls between these"""


def cut_of(config: Config) -> Cut:
    """The cut of a resolved config."""
    parallel = config.parallel
    return _cut(
        config.model, config.data.sequence_length, parallel.pp, parallel.schedule, parallel.virtual_stages, parallel.recompute
    )


@lru_cache(maxsize=2048)
def _cut(model: Model, sequence_length: int, pp: int, schedule: str, virtual_stages: int, recompute: str) -> Cut:
    """By all that `stage_layers` reads of a config."""
    layout = {"pp": pp, "schedule": schedule, "virtual_stages": virtual_stages, "recompute": recompute}
    parallel = Parallel().model_copy(update=layout)
    data = Data().model_copy(update={"sequence_length": sequence_length})
    stages = stage_layers(Config().model_copy(update={"model": model, "data": data, "parallel": parallel}))
    routed, strided = frozenset(routed_layers(model)), frozenset(strided_layers(model))
    counts = [dict(Counter((layer == 0, layer in routed, layer in strided) for layer in layers)) for layers in stages]
    by_rank: list[list[int]] = [[] for _ in range(pp)]
    for stage in range(stage_count(parallel)):
        by_rank[rank_of_stage(stage, parallel)].append(stage)
    first: dict[object, int] = {}
    last: dict[object, int] = {}
    for rank, mine in enumerate(by_rank):
        ends = 0 in mine, len(stages) - 1 in mine
        alike = (ends, tuple(tuple(counts[stage].items()) for stage in mine))
        first.setdefault(alike, rank)
        last[alike] = rank
    return Cut(stages, counts, by_rank, sorted({*first.values(), *last.values()}))
