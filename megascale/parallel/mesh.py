"""Where each rank stands in the layout, and the process groups of its axes.

Ranks count pp slowest and tp fastest: world = pp x dp x stream x cp x tp. Experts have their own mesh over the ranks of one stage, counted
in the same order: edp x ep x etp, with etp = tp or etp = 1. Where etp is 1, expert-parallel ranks are neighbours, and tensor-parallel
ranks, which dispatch their own tokens, hold different experts or the same; else those hold the parts of the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch.distributed as dist
from torch import Tensor

from megascale.config.layout import V_SHAPED, WORLD_AXES, data_parallel_ranks
from megascale.config.schema import Model, Parallel
from megascale.parallel.charge import charged_to
from megascale.parallel.device import Device
from megascale.parallel.world import World

DATA = ("dp", "stream", "cp")
"""Axes over which every rank holds all parameters but the experts; ZeRO shards over them."""
STAGE = ("dp", "stream", "cp", "tp")
"""All ranks of one pipeline stage."""
POPULATION = ("dp", "cp", "tp")
"""Axes over which the tokens of one stream in a micro-batch are spread: what routers count over. Each rank of `dp` reads sequences of its
own, those that differ on other axes only read the same ones."""

Ranks = tuple[int, ...]
"""Global ranks, ascending."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; pure arithmetic, no process group."""

    sizes: dict[str, int]
    ep: int
    kv_heads: int
    v_shaped: bool = False
    """the first and the last pipeline stage are on pipeline rank 0"""
    etp: int = 1
    """1, or as many as tp"""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(self.sizes.values())

    def place(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank on all axes."""
        place = {}
        for axis in reversed(WORLD_AXES):
            rank, place[axis] = divmod(rank, self.sizes[axis])
        return place

    def rank(self, place: dict[str, int]) -> int:
        """The rank at these coordinates."""
        rank = 0
        for axis in WORLD_AXES:
            rank = rank * self.sizes[axis] + place[axis]
        return rank

    def along(self, rank: int, *axes: str) -> Ranks:
        """The ranks that differ from `rank` on these axes only."""
        place, found = self.place(rank), [rank]
        for axis in axes:
            step = self.step(axis)
            found = [other + (i - place[axis]) * step for other in found for i in range(self.sizes[axis])]
        return tuple(sorted(found))

    def step(self, axis: str) -> int:
        """How far apart neighbours on an axis are, in ranks."""
        return prod(self.sizes[faster] for faster in WORLD_AXES[WORLD_AXES.index(axis) + 1 :])

    def expert_peers(self, rank: int) -> Ranks:
        """ep: the ranks of the stage among which the experts, or the same parts of all of them, are spread."""
        ranks = self._with_same_part(rank)
        first = ranks.index(rank) // self.ep * self.ep
        return ranks[first : first + self.ep]

    def expert_holders(self, rank: int) -> Ranks:
        """edp: the ranks of the stage with the same experts, or the same parts of them."""
        ranks = self._with_same_part(rank)
        return ranks[ranks.index(rank) % self.ep :: self.ep]

    def _with_same_part(self, rank: int) -> Ranks:
        """The ranks of the stage that hold the same part of any expert that they hold."""
        return self.along(rank, *(DATA if self.etp > 1 else STAGE))

    def kv_peers(self, rank: int) -> Ranks:
        """Tensor-parallel ranks with the same key/value head: several where tp is larger than the number of those heads."""
        tensor = self.along(rank, "tp")
        shared = max(self.sizes["tp"] // self.kv_heads, 1)
        first = tensor.index(rank) // shared * shared
        return tensor[first : first + shared]

    def ends(self, rank: int) -> Ranks:
        """The same place in the first and in the last stage, for a rank in one of them; else the rank alone."""
        place = self.place(rank)
        last = self.sizes["pp"] - 1
        if self.v_shaped or place["pp"] not in (0, last):
            return (rank,)
        return tuple(sorted({self.rank({**place, "pp": 0}), self.rank({**place, "pp": last})}))

    def over_data(self, ranks: Ranks) -> Ranks:
        """These ranks and their counterparts on the data axes: who shares a gradient sum with them."""
        return tuple(sorted({other for rank in ranks for other in self.along(rank, *DATA)}))


@dataclass(frozen=True)
class Mesh:
    """This rank in its layout, with the process groups that it belongs to."""

    world: World
    layout: Layout
    groups: dict[Ranks, dist.ProcessGroup] = field(default_factory=dict)
    """by their ranks; groups of one rank have none"""

    @property
    def place(self) -> dict[str, int]:
        """This rank's coordinates."""
        return self.layout.place(self.world.rank)

    def size(self, axis: str) -> int:
        """Ranks along an axis (ep and etp included)."""
        return getattr(self.layout, axis) if axis in ("ep", "etp") else self.layout.sizes[axis]

    def along(self, *axes: str) -> Ranks:
        """The ranks that differ from this one on these axes only."""
        return self.layout.along(self.world.rank, *axes)

    def sum(self, x: Tensor, *axes: str) -> Tensor:
        """The sum over the ranks along these axes, in place."""
        ranks = self.along(*axes)
        if len(ranks) > 1:
            with charged_to("world"):
                dist.all_reduce(x, group=self.group(ranks))
        return x

    def group(self, ranks: Ranks) -> dist.ProcessGroup:
        """The process group of more than one rank."""
        return self.groups[ranks]


def make_layout(parallel: Parallel, model: Model, world: int) -> Layout:
    """The layout of a checked config for a world of this many ranks."""
    dp = data_parallel_ranks(parallel, world)
    assert dp is not None
    sizes = {axis: dp if axis == "dp" else getattr(parallel, axis) for axis in WORLD_AXES}
    assert prod(sizes.values()) == world, "the config's check has seen to it"
    return Layout(sizes, parallel.ep, model.kv_heads or model.heads, parallel.schedule in V_SHAPED, parallel.etp)


def alone(device: Device) -> Mesh:
    """The mesh of one process that works by itself."""
    return Mesh(World(0, 1, device), Layout(dict.fromkeys(WORLD_AXES, 1), 1, 1))


def open_mesh(parallel: Parallel, model: Model, world: World) -> Mesh:
    """The mesh of a checked config with its process groups. Called by all ranks together."""
    layout = make_layout(parallel, model, world.size)
    kinds: tuple[Callable[[int], Ranks], ...] = (
        *(lambda rank, axis=axis: layout.along(rank, axis) for axis in WORLD_AXES),
        lambda rank: layout.along(rank, *DATA),
        lambda rank: layout.along(rank, *STAGE),
        lambda rank: layout.along(rank, *POPULATION),
        layout.expert_peers,
        layout.expert_holders,
        layout.kv_peers,
        layout.ends,
        lambda rank: layout.over_data(layout.kv_peers(rank)),
        lambda rank: layout.over_data(layout.ends(rank)),
    )
    # every group is made by all ranks in one order: each rank finds the same list by arithmetic
    wanted = sorted({ranks for kind in kinds for ranks in _partition(kind, layout.world) if len(ranks) > 1})
    groups = {}
    for ranks in wanted:
        everyone = len(ranks) == layout.world
        group = dist.group.WORLD if everyone else dist.new_group(list(ranks), timeout=None)
        if world.rank in ranks:
            assert group is not None
            groups[ranks] = group
    return Mesh(world, layout, groups)


def _partition(kind: Callable[[int], Ranks], world: int) -> Iterator[Ranks]:
    """All groups of a kind. Each rank is in one of them, so that a group is computed once, not once for each of its ranks."""
    seen: set[int] = set()
    for rank in range(world):
        if rank not in seen:
            seen.update(ranks := kind(rank))
            yield ranks
