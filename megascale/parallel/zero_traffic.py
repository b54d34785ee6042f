"""What ZeRO sends, by arithmetic: a dry run has no DeepSpeed engine. Written against DeepSpeed 0.19.8 and `megascale.parallel.zero`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from megascale.parallel.ledger import Ledger
from megascale.parallel.mesh import DATA, Mesh, Ranks
from megascale.parallel.placement import Placement

GRADIENT_BYTES = 4
NORM_BYTES = 8
MOST_LIVE = 10**9
"""Elements that DeepSpeed's stage 3 keeps gathered by default (stage3_max_live_parameters, stage3_max_reuse_distance)."""


def zero_traffic(
    ledger: Ledger, trained: Mapping[str, Tensor], placements: Mapping[str, Placement], mesh: Mesh, stage: int, micro_batches: int
) -> None:
    """Note what one step exchanges, without padding, one call for each set of ranks: gradients (fp32) and weights (their own dtype) as dp,
    the norm as world.

    Gradients are first summed over the holders that share no partition. Stages 1 and 2 all-reduce them over the ranks of the partitions
    (DeepSpeed's default even with `reduce_scatter`: each rank keeps its part of the sum) and all-gather the new weights. Stage 3
    reduce-scatters gradients once a step. It all-gathers weights once a step where all of them may stay gathered, else for each forward and
    backward pass: the most it may take, because some of them may stay.
    """
    data = mesh.along(*DATA)
    shards = {name: data if stage == 3 else placements[name].sharded_over for name in trained}

    def bytes_over(ranks_of: Callable[[str], Ranks], bytes_of: Callable[[Tensor], int]) -> dict[Ranks, int]:
        volumes: dict[Ranks, int] = {}
        for name, parameter in trained.items():
            volumes[ranks_of(name)] = volumes.get(ranks_of(name), 0) + parameter.numel() * bytes_of(parameter)
        return {ranks: volume for ranks, volume in volumes.items() if len(ranks) > 1}

    def peers(name: str) -> Ranks:
        holders = placements[name].holders
        return holders[: len(holders) // len(shards[name])]  # how many they are is all that counts

    def note(kind: str, volumes: Mapping[Ranks, int], calls: int = 1) -> None:
        for ranks, volume in volumes.items():
            ledger.note(kind, ranks, volume * calls, "dp", calls)

    world = tuple(range(mesh.world.size))
    if len(world) > 1:
        ledger.note("all-reduce", world, NORM_BYTES, "world")
    note("all-reduce", bytes_over(peers, lambda _: GRADIENT_BYTES))
    gradients = bytes_over(shards.__getitem__, lambda _: GRADIENT_BYTES)
    weights = bytes_over(shards.__getitem__, lambda parameter: parameter.element_size())
    if stage < 3:
        note("all-reduce", gradients)
        note("all-gather", weights)
    else:
        note("reduce-scatter", gradients)
        stay = sum(parameter.numel() for parameter in trained.values()) <= MOST_LIVE
        note("all-gather", weights, 1 if stay else 2 * micro_batches)
