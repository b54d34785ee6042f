"""Layouts that cannot work, each with the nearest values that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megascale.config.fields import KeyPath
from megascale.config.layout import (
    SPLIT_BACKWARD,
    WORLD_AXES,
    batch_fits,
    data_parallel_ranks,
    expert_ranks,
    other_ranks,
    pipeline_bubble,
    stages_per_rank,
)
from megascale.config.layout_search import layouts, nearest, nearest_worlds
from megascale.config.obstacles import (
    context_obstacles,
    expert_obstacles,
    pipeline_obstacles,
    schedule_fits,
    stream_obstacles,
    tensor_obstacles,
    width_obstacles,
)
from megascale.config.origin import Problem
from megascale.config.resolve import feed_forward_width
from megascale.config.schema import Config, Parallel
from megascale.config.size import expert_row_unit

MOST_BUBBLE = 0.5
MOST_LAYOUTS_SHOWN = 3


def layout_problems(config: Config, world: int | None) -> Iterator[Problem]:
    """Every axis that does not fit the other settings, a world that is not the product of the axes, and batches that ranks cannot share."""
    parallel = config.parallel
    yield from _axis_problems(config, "tp", tensor_obstacles, config.model.heads)
    yield from _axis_problems(config, "stream", stream_obstacles, config.model.streams.count)
    yield from _axis_problems(config, "cp", context_obstacles, config.data.sequence_length)
    yield from _pipeline_problems(config, world)
    wrong_world = list(_world_problems(parallel, world))
    ranks = None if wrong_world else data_parallel_ranks(parallel, world)
    yield from _expert_width_problems(config)
    yield from _expert_problems(config, ranks)
    yield from wrong_world
    yield from _batch_problems(config, ranks)


def contradictions(config: Config) -> Iterator[Problem]:
    """Settings of the layout that exclude each other, whatever the number of ranks."""
    parallel = config.parallel
    if parallel.pp > 1 and parallel.schedule == "interleaved" and parallel.virtual_stages == 1:
        reason = "interleaved needs at least 2 stages a rank; set parallel.virtual_stages=2, or parallel.schedule=1f1b"
        yield Problem(("parallel", "virtual_stages"), reason, (("parallel", "schedule"),))
    if parallel.pp > 1 and parallel.schedule in SPLIT_BACKWARD and config.compile == "on":
        reason = (
            f"{parallel.schedule} keeps gradients of the weights for later, which torch.compile cannot trace; set compile=auto"
        )
        yield Problem(("parallel", "schedule"), reason, (("compile",),))
    if parallel.recompute == "stream" and config.model.streams.count == 1:
        reason = "stream keeps one stream's activations at a time, and there is one stream; set parallel.recompute=layer"
        yield Problem(("parallel", "recompute"), reason, (("model", "streams", "count"),))
    if parallel.recompute == "stream" and 1 < config.model.streams.count == parallel.stream:
        reason = "stream keeps one stream's activations at a time, and each rank has one; set parallel.recompute=layer"
        yield Problem(("parallel", "recompute"), reason, (("parallel", "stream"),))
    if parallel.zero_stage == 3 and config.compile == "on":
        reason = "3 gathers weights inside the layers, which torch.compile would trace; set compile=auto"
        yield Problem(("parallel", "zero_stage"), reason, (("compile",),))
    if parallel.zero_stage == 3 and config.optimizer.name == "muon":
        reason = "3 cuts the matrices, which Muon needs whole; set parallel.zero_stage=2"
        yield Problem(("parallel", "zero_stage"), reason, (("optimizer", "name"),))


def layout_remedy(config: Config, world: int) -> str:
    """The layouts of this world that work, nearest to the wanted one; where there are none, the nearest worlds."""
    found = [str(layout) for layout in layouts(config, world)]
    if found:
        some = "the nearest layouts" if len(found) > MOST_LAYOUTS_SHOWN else "the layouts"
        return f"{some} of {world} ranks that work: {'; '.join(found[:MOST_LAYOUTS_SHOWN])}"
    worlds = " or ".join(map(str, nearest_worlds(config, world)))
    return f"no layout of {world} ranks works with the other settings" + (f"; {worlds} ranks do" if worlds else "")


def layout_warnings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Layouts that work but waste."""
    parallel, micro_batches = config.parallel, config.batch.micro_batches
    bubble = pipeline_bubble(parallel, micro_batches)
    if bubble > MOST_BUBBLE:
        work = f"{micro_batches} micro-batches x {stages_per_rank(parallel)} stages a rank"
        waits = f"pp {parallel.pp} with {work}: ranks wait {bubble:.0%} of the time"
        yield ("parallel", "pp"), f"{waits}; more batch.micro_batches shrink it"
    if parallel.zero_stage == 2 and parallel.pp > 1:
        reason = "2 saves no memory over 1 with a pipeline: the gradients of all micro-batches are kept whole until the last"
        yield ("parallel", "zero_stage"), reason


def _axis_problems(config: Config, axis: str, obstacles: Callable[[Config, int], list[str]], most: int) -> Iterator[Problem]:
    """An axis whose ranks the other settings alone allow or not; `most` bounds the search for those that work."""
    ranks = getattr(config.parallel, axis)
    reasons = obstacles(config, ranks)
    if reasons:
        near = nearest(ranks, lambda ranks: not obstacles(config, ranks), most)
        yield Problem(("parallel", axis), f"{axis} {ranks} {' and '.join(reasons)}; {_works(axis, near)}")


def _pipeline_problems(config: Config, world: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    reasons = pipeline_obstacles(config, parallel.pp)
    if not reasons:
        return
    near = _works("pp", nearest(parallel.pp, lambda ranks: not pipeline_obstacles(config, ranks), config.model.layers))
    if len(reasons) == 1 and not schedule_fits(parallel, parallel.pp, config.batch.micro_batches):
        near += _other_micro_batches(config, data_parallel_ranks(parallel, world) or 1)
    yield Problem(("parallel", "pp"), f"pp {parallel.pp} {' and '.join(reasons)}; {near}")


def _other_micro_batches(config: Config, ranks: int) -> str:
    def works(micro_batches: int) -> bool:
        fits = schedule_fits(config.parallel, config.parallel.pp, micro_batches)
        return fits and batch_fits(config.batch, micro_batches, ranks)

    near = nearest(config.batch.micro_batches, works, config.batch.sequences)
    return f"; or batch.micro_batches {' or '.join(map(str, near))}" if near else ""


def _expert_width_problems(config: Config) -> Iterator[Problem]:
    parallel, experts = config.parallel, config.model.experts
    if parallel.etp == 1:
        return
    if parallel.etp != parallel.tp:
        fits = sorted({1, parallel.tp} if not width_obstacles(config, parallel.tp) else {1})
        reason = f"etp {parallel.etp} is neither 1 nor tp {parallel.tp}; {_works('etp', fits)}"
        yield Problem(("parallel", "etp"), reason, (("parallel", "tp"),))
        return
    reasons = width_obstacles(config, parallel.etp)
    if reasons:
        near = _works("etp", [1])
        if experts.count > 1:
            width = experts.width or feed_forward_width(config.model)
            near += f"; or model.experts.width {_multiples(width, parallel.etp * expert_row_unit(config))}"
        yield Problem(
            ("parallel", "etp"), f"etp {parallel.etp} {' and '.join(reasons)}; {near}", (("model", "experts", "width"),)
        )


def _expert_problems(config: Config, data_ranks: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    taken = data_ranks and expert_ranks(parallel, data_ranks)
    reasons = expert_obstacles(config, parallel.ep, taken)
    if reasons:
        near = nearest(parallel.ep, lambda ranks: not expert_obstacles(config, ranks, taken), config.model.experts.count)
        others: tuple[KeyPath, ...] = (("model", "experts", "count"), ("parallel", "dp"))
        yield Problem(("parallel", "ep"), f"ep {parallel.ep} {' and '.join(reasons)}; {_works('ep', near)}", others)


def _world_problems(parallel: Parallel, world: int | None) -> Iterator[Problem]:
    if world is None:
        return
    others = other_ranks(parallel)
    axes: tuple[KeyPath, ...] = tuple(("parallel", axis) for axis in WORLD_AXES)
    if world % others:
        sizes = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in WORLD_AXES if axis != "dp")
        near = f"{world - world % others} or {world - world % others + others}" if world > others else str(others)
        reason = f"world {world} is not a multiple of {sizes} (= {others}), so no dp fits; the nearest world is {near}"
        yield Problem(("parallel", "dp"), reason, axes)
    elif parallel.dp is not None and parallel.dp * others != world:
        sizes = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in WORLD_AXES)
        reason = f"world {world} != {sizes} (= {parallel.dp * others}); dp {world // others} works, or leave dp out"
        yield Problem(("parallel", "dp"), reason)


def _batch_problems(config: Config, ranks: int | None) -> Iterator[Problem]:
    others: tuple[KeyPath, ...] = (("batch", "micro_batches"), ("parallel", "dp"))
    yield from _uneven(("batch", "sequences"), config.batch.sequences, config.batch.micro_batches, ranks, others)
    for index, stage in enumerate(config.batch.ramp):
        path = ("batch", "ramp", index, "sequences")
        yield from _uneven(path, stage.sequences, config.batch.micro_batches, ranks, others)


def _uneven(path: KeyPath, sequences: int, micro: int, ranks: int | None, others: tuple[KeyPath, ...]) -> Iterator[Problem]:
    if sequences % micro:
        reason = f"{sequences} sequences / {micro} micro-batches = {sequences / micro:.2f}, not a whole number"
        yield Problem(path, f"{reason}; {_nearest_multiple(sequences, micro * (ranks or 1))}", others)
    elif ranks and sequences // micro % ranks:
        reason = f"{sequences} sequences / {micro} micro-batches / dp {ranks} = {sequences / micro / ranks:.2f} per rank"
        yield Problem(path, f"{reason}, not a whole number; {_nearest_multiple(sequences, micro * ranks)}", others)


def _nearest_multiple(number: int, unit: int) -> str:
    return f"the nearest that works is {_multiples(number, unit)}"


def _multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return f"{f'{below} or ' if below else ''}{below + unit}"


def _works(axis: str, numbers: list[int]) -> str:
    return f"{axis} {' or '.join(map(str, numbers))} {'works' if len(numbers) == 1 else 'work'}"
