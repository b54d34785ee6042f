"""The nearest values that work, for a single setting and for a whole layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megascale.config.layout import batch_fits
from megascale.config.obstacles import (
    context_obstacles,
    expert_obstacles,
    pipeline_obstacles,
    stream_obstacles,
    tensor_obstacles,
    width_obstacles,
)
from megascale.config.schema import Config

MOST_TRIED = 2**17
MOST_WORLDS_TRIED = 256


@dataclass(frozen=True)
class Layout:
    """Ranks along the axes that a layout may choose."""

    pp: int
    dp: int
    tp: int
    ep: int
    stream: int = 1
    cp: int = 1
    etp: int = 1

    def __str__(self) -> str:
        more = "".join(f" x {axis} {getattr(self, axis)}" for axis in ("stream", "cp") if getattr(self, axis) > 1)
        experts = "".join(f", {axis} {getattr(self, axis)}" for axis in ("ep", "etp") if getattr(self, axis) > 1)
        return f"pp {self.pp} x dp {self.dp}{more} x tp {self.tp}{experts}"


def nearest(wanted: int, works: Callable[[int], bool], most: int) -> list[int]:
    """The largest number below and the smallest above the wanted one that work, in 1 ... most."""
    most = min(most, MOST_TRIED)
    below = next((number for number in range(min(wanted - 1, most), 0, -1) if works(number)), None)
    above = next((number for number in range(wanted + 1, most + 1) if works(number)), None)
    return [number for number in (below, above) if number is not None]


def layouts(config: Config, world: int) -> list[Layout]:
    """All layouts of a world that work with the other settings, nearest to the wanted axes first. Stream- and context-parallel ranks stay
    as they are set, where they can, and where etp is set it is tp.

    Distance is the sum over the axes of |log2(ranks / wanted ranks)|; dp counts where it was set.
    """
    return sorted(_layouts(config, world), key=lambda layout: _distance(config, layout))


def nearest_worlds(config: Config, world: int) -> list[int]:
    """The nearest numbers of ranks, below and above, for which some layout works."""
    below = range(world - 1, max(0, world - MOST_WORLDS_TRIED), -1)
    above = range(world + 1, world + MOST_WORLDS_TRIED)
    found = (next((size for size in sizes if any(_layouts(config, size))), None) for sizes in (below, above))
    return [size for size in found if size is not None]


def _layouts(config: Config, world: int) -> Iterator[Layout]:
    pipelined = config.parallel.schedule != "1f1b"  # has no effect without a pipeline
    splits_width = config.parallel.etp > 1
    stream, cp = config.parallel.stream, config.parallel.cp
    others = stream * cp
    if world % others or stream_obstacles(config, stream) or context_obstacles(config, cp):
        return
    world //= others
    for tp in divisors(world):
        if tensor_obstacles(config, tp) or (splits_width and width_obstacles(config, tp)):
            continue
        for pp in divisors(world // tp):
            dp = world // tp // pp
            if (
                pipeline_obstacles(config, pp)
                or (pipelined and pp == 1)
                or not batch_fits(config.batch, config.batch.micro_batches, dp)
            ):
                continue
            ranks = dp * others * (1 if splits_width else tp)
            for ep in divisors(math.gcd(config.model.experts.count, ranks)):
                if not expert_obstacles(config, ep, ranks):
                    yield Layout(pp, dp, tp, ep, stream, cp, tp if splits_width else 1)


def _distance(config: Config, layout: Layout) -> tuple[float, int, int, int]:
    parallel = config.parallel
    wanted = {"pp": parallel.pp, "dp": parallel.dp or layout.dp, "tp": parallel.tp, "ep": parallel.ep}
    far = sum(abs(math.log2(getattr(layout, axis) / ranks)) for axis, ranks in wanted.items())
    return round(far, 9), layout.tp, layout.pp, layout.ep  # among equals the one that communicates least


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return low + [number // divisor for divisor in reversed(low) if divisor * divisor != number]
