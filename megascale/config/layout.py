"""The arithmetic of ranks and batches."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.fields import KeyPath
from megascale.config.origin import Problem
from megascale.config.schema import Config, Parallel

WORLD_AXES = ("pp", "dp", "stream", "cp", "tp")
NOT_AVAILABLE = ("pp", "stream", "cp", "tp", "ep")


def data_parallel_ranks(parallel: Parallel, world: int | None) -> int | None:
    """Data-parallel ranks: as set, or world / the other axes (rounded down); none where neither is known."""
    if parallel.dp is not None or world is None:
        return parallel.dp
    return world // _others(parallel)


def layout_problems(parallel: Parallel, world: int | None) -> Iterator[Problem]:
    """Axes that this version lacks, and a world that is not the product of the axes."""
    for axis in NOT_AVAILABLE:
        ranks = getattr(parallel, axis)
        if ranks > 1:
            yield Problem(("parallel", axis), f"{axis} {ranks} is not available in this version: only dp is; remove it")
    if world is not None:
        yield from _world_problems(parallel, world)


def batch_problems(config: Config, world: int | None) -> Iterator[Problem]:
    """Batches, the full one and those of the ramp, that cannot be shared evenly by micro-batches and ranks."""
    ranks = data_parallel_ranks(config.parallel, world)
    others: tuple[KeyPath, ...] = (("batch", "micro_batches"), ("parallel", "dp"))
    yield from _uneven(("batch", "sequences"), config.batch.sequences, config.batch.micro_batches, ranks, others)
    for index, stage in enumerate(config.batch.ramp):
        path = ("batch", "ramp", index, "sequences")
        yield from _uneven(path, stage.sequences, config.batch.micro_batches, ranks, others)


def _others(parallel: Parallel) -> int:
    """The product of all axes of the world but dp."""
    return parallel.pp * parallel.stream * parallel.cp * parallel.tp


def _world_problems(parallel: Parallel, world: int) -> Iterator[Problem]:
    others = _others(parallel)
    axes: tuple[KeyPath, ...] = tuple(("parallel", axis) for axis in WORLD_AXES)
    if world % others:
        sizes = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in WORLD_AXES if axis != "dp")
        nearest = f"{world - world % others} or {world - world % others + others}" if world > others else str(others)
        reason = f"world {world} is not a multiple of {sizes} (= {others}), so no dp fits; the nearest world is {nearest}"
        yield Problem(("parallel", "dp"), reason, axes)
    elif parallel.dp is not None and parallel.dp * others != world:
        sizes = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in WORLD_AXES)
        reason = f"world {world} != {sizes} (= {parallel.dp * others}); dp {world // others} works, or leave dp out"
        yield Problem(("parallel", "dp"), reason)


def _uneven(path: KeyPath, sequences: int, micro: int, ranks: int | None, others: tuple[KeyPath, ...]) -> Iterator[Problem]:
    if sequences % micro:
        reason = f"{sequences} sequences / {micro} micro-batches = {sequences / micro:.2f}, not a whole number"
        yield Problem(path, f"{reason}; {_nearest(sequences, micro * (ranks or 1))}", others)
    elif ranks and sequences // micro % ranks:
        reason = f"{sequences} sequences / {micro} micro-batches / dp {ranks} = {sequences / micro / ranks:.2f} per rank"
        yield Problem(path, f"{reason}, not a whole number; {_nearest(sequences, micro * ranks)}", others)


def _nearest(number: int, unit: int) -> str:
    below = number // unit * unit
    return f"the nearest that works is {f'{below} or ' if below else ''}{below + unit}"
