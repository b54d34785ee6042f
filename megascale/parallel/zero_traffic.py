"""What ZeRO sends, by arithmetic: a dry run has no DeepSpeed engine. Written against DeepSpeed 0.19.8 and `megascale.parallel.zero`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from megascale.config.schema import Config
from megascale.parallel.charge import charged_to
from megascale.parallel.ledger import Ledger
from megascale.parallel.mesh import DATA, Mesh, Ranks
from megascale.parallel.placement import Placement

BUCKET = 2**25
"""Gradient elements reduced by one collective: 128 MiB. DeepSpeed's default would allocate 2 GB for it."""
GRADIENT_BYTES = 4
NORM_BYTES = 8
MOST_LIVE = 10**9
"""Elements that DeepSpeed's stage 3 keeps gathered by default (stage3_max_live_parameters, stage3_max_reuse_distance)."""


def zero_settings(passthrough: Mapping[str, Any]) -> Mapping[str, Any]:
    """The user's settings of DeepSpeed's ZeRO."""
    return passthrough.get("zero_optimization", {})


def overlaps(config: Config, mesh: Mesh, stage: int) -> bool:
    """Whether gradients are reduced while the last backward pass runs. Not under a pipeline: ranks of different stages finish different
    gradients first, and reductions would start in different orders. And not where a gradient arises several times in a backward pass: with
    ZeRO 3 recomputed streams have one each (`megascale.parallel.recompute`).
    """
    again = stage == 3 and config.parallel.recompute == "stream" and config.model.streams.count > mesh.size("stream")
    return mesh.size("pp") == 1 and not again and zero_settings(config.engine.deepspeed).get("overlap_comm", True)


def reduction_order(trained: Mapping[str, Tensor], with_peers: Collection[str], overlap: bool) -> tuple[list[str], int]:
    """Names of parameters in the order in which their gradients are reduced, and how many of them as soon as they are final.

    Last parameter first, as backward passes go; behind them those with peers, whose gradients are summed over these before.
    """
    backwards = list(trained)[::-1]
    alone = [name for name in backwards if name not in with_peers]
    return alone + [name for name in backwards if name in with_peers], len(alone) if overlap else 0


def _hidden(trained: Mapping[str, Tensor], early: Sequence[str], bucket: int) -> set[str]:
    """Those of these gradients whose bucket is full, and reduced, before the last of them is final."""
    hidden: set[str] = set()
    waiting: list[str] = []
    for name in early:
        if sum(trained[other].numel() for other in waiting) + trained[name].numel() > bucket:
            hidden.update(waiting)
            waiting = []
        waiting.append(name)
    return hidden


def zero_traffic(
    ledger: Ledger,
    trained: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    mesh: Mesh,
    stage: int,
    config: Config,
) -> None:
    """Note what one step exchanges, without padding, one call for each set of ranks: gradients (fp32) and weights (their own dtype) as dp,
    the norm as world.

    Gradients are first summed over the holders that share no partition. Stages 1 and 2 all-reduce them over the ranks of the partitions
    (DeepSpeed's default even with `reduce_scatter`: each rank keeps its part of the sum) and all-gather the new weights. Stage 3
    reduce-scatters gradients once a step. It all-gathers weights once a step where all of them may stay gathered, else for each forward and
    backward pass: the most it may take, because some of them may stay.

    Args:
        config: of the run.
    """
    data = mesh.along(*DATA)
    shards = {name: data if stage == 3 else placements[name].sharded_over for name in trained}

    def bytes_over(
        ranks_of: Callable[[str], Ranks], bytes_of: Callable[[Tensor], int], names: Collection[str] = trained.keys()
    ) -> dict[Ranks, int]:
        volumes: dict[Ranks, int] = {}
        for name in names:
            parameter = trained[name]
            volumes[ranks_of(name)] = volumes.get(ranks_of(name), 0) + parameter.numel() * bytes_of(parameter)
        return {ranks: volume for ranks, volume in volumes.items() if len(ranks) > 1}

    def peers(name: str) -> Ranks:
        holders = placements[name].holders
        return holders[: len(holders) // len(shards[name])]  # how many they are is all that counts

    def note(kind: str, volumes: Mapping[Ranks, int], calls: int = 1) -> None:
        for ranks, volume in volumes.items():
            ledger.note(kind, ranks, volume, "dp", calls)

    world = tuple(range(mesh.world.size))
    if len(world) > 1:
        ledger.note("all-reduce", world, NORM_BYTES, "world")
    note("all-reduce", bytes_over(peers, lambda _: GRADIENT_BYTES))
    with_peers = {name for name in trained if len(peers(name)) > 1}
    order, number = reduction_order(trained, with_peers, overlaps(config, mesh, stage))
    early = _hidden(
        trained, order[: max(number - 1, 0)], zero_settings(config.engine.deepspeed).get("reduce_bucket_size", BUCKET)
    )
    gradients = bytes_over(shards.__getitem__, lambda _: GRADIENT_BYTES)
    beside = bytes_over(shards.__getitem__, lambda _: GRADIENT_BYTES, early)
    weights = bytes_over(shards.__getitem__, lambda parameter: parameter.element_size())
    kind = "all-reduce" if stage < 3 else "reduce-scatter"
    note(kind, {ranks: volume - beside.get(ranks, 0) for ranks, volume in gradients.items()})
    with charged_to("dp", hidden=True):
        note(kind, beside, 0)
    if stage < 3:
        note("all-gather", weights)
    else:
        stay = sum(parameter.numel() for parameter in trained.values()) <= MOST_LIVE
        times = 1 if stay else 2 * config.batch.micro_batches
        note("all-gather", {ranks: times * volume for ranks, volume in weights.items()}, times)
