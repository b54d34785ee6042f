"""The best layouts of a run on a cluster: every layout that the trainer's own rules allow, pruned by bounds, by planned step time.

What is searched: tp, pp, schedule, stages a rank, ep, etp, cp, stream, dp, ZeRO stage, micro-batches, recompute. What is left as it is: the
model, the batch of a step, the optimizer, the precision, the kind of context parallelism. ZeRO 2 is left out: it keeps gradients whole, as
ZeRO 1 does, until the last micro-batch.

A run with phases, or whose batch grows, has parts that cost differently (`megascale.plan.parts`). A layout must hold all of them, each is
planned by itself, and the layout of the shortest run is the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megascale.config.errors import InputError
from megascale.config.layout import SPLIT_BACKWARD, batch_fits, expert_ranks, pipeline_bubble
from megascale.config.layout_search import divisors
from megascale.config.obstacles import (
    context_obstacles,
    expert_obstacles,
    pipeline_obstacles,
    stream_obstacles,
    tensor_obstacles,
    width_obstacles,
)
from megascale.config.schema import Config, Parallel
from megascale.plan.cluster import Cluster
from megascale.plan.memory import Memory, worst_rank
from megascale.plan.parts import Part, parts_of
from megascale.plan.rank import Plan
from megascale.plan.time import StepTime, step_time

MOST_SEQUENCES = 16
"""Of a micro-batch on one rank: more change little."""
MOST_STAGES = 8
"""Stages a rank of the interleaved schedules."""
LEAST_TOKENS = 1024
"""Of a sequence on one context-parallel rank: with fewer, messages are longer than the work."""


@dataclass(frozen=True)
class PlannedPart:
    """Steps of a run that cost alike, in a layout."""

    steps: float
    plan: Plan
    memory: Memory
    """of the fullest pipeline rank"""
    rank: int
    """that pipeline rank"""
    time: StepTime
    """of one of the steps"""


@dataclass(frozen=True)
class Found:
    """A layout that fits, with what it costs."""

    config: Config
    """the run with this layout"""
    parts: tuple[PlannedPart, ...]
    """of the run, those of its start first"""

    @cached_property
    def main(self) -> PlannedPart:
        """The part with most FLOPs: the same in every layout."""
        return max(self.parts, key=lambda part: part.steps * part.plan.flops)

    @cached_property
    def fullest(self) -> PlannedPart:
        """The part that needs most memory."""
        return max(self.parts, key=lambda part: part.memory.total)

    @property
    def plan(self) -> Plan:
        """Of the part with most FLOPs."""
        return self.main.plan

    @property
    def time(self) -> StepTime:
        """Of a step of the part with most FLOPs."""
        return self.main.time

    @property
    def memory(self) -> Memory:
        """Of the fullest pipeline rank in the part that needs most."""
        return self.fullest.memory

    @property
    def rank(self) -> int:
        """That pipeline rank."""
        return self.fullest.rank

    @cached_property
    def seconds(self) -> float:
        """Of all steps of the run, without failures."""
        return sum(part.steps * part.time.total for part in self.parts)

    @property
    def tokens(self) -> float:
        """Of all steps of the run."""
        return sum(part.steps * part.plan.step_tokens for part in self.parts)

    @property
    def flops(self) -> float:
        """Model FLOPs of all steps of the run."""
        return sum(part.steps * part.plan.flops for part in self.parts)

    @property
    def axes(self) -> tuple[int, ...]:
        """Ranks along all axes."""
        parallel = self.config.parallel
        return parallel.tp, parallel.pp, parallel.ep, parallel.etp, parallel.cp, parallel.stream

    @property
    def rate(self) -> float:
        """Model FLOP/s of a device, mean over the run; over its peak it is what `perf/mfu` says."""
        return self.flops / self.seconds / self.plan.world


@dataclass
class Search:
    """What a search found."""

    found: list[Found] = field(default_factory=list)
    """fastest first"""
    tried: int = 0
    """layouts that the rules allow"""
    too_large: int = 0
    """of these, without room in memory"""
    too_slow: int = 0
    """of these, left out by a bound on their time"""
    smallest: tuple[float, Config] | None = None
    """bytes of the layout that needs least, where none fits"""


def search(
    config: Config, cluster: Cluster, gpus: int, most: int = 10, imbalance: float = 1.0, tokens: float | None = None
) -> Search:
    """The fastest layouts of a run, at most so many; of those that differ in schedule, micro-batches, ZeRO or recomputation alone the best.

    Args:
        config: resolved; knows the vocabulary's size. Its layout and micro-batches are not read.
        imbalance: rows of the fullest rank's experts over an even share.
        tokens: of the run, in place of those of its steps.

    Raises:
        InputError: no layout of so many GPUs works with the model and the batch, or none fits the memory.
    """
    result = Search()
    config = _bare(config)
    parts = parts_of(config, tokens)
    flops = sum(part.steps * Plan(_with(part.config, {"dp": 1}, part.config.batch.sequences), 1).flops for part in parts)
    least = flops / gpus / (cluster.peak_flops * max(cluster.efficiency.matmul, cluster.efficiency.attention))
    fits = False
    for candidate in candidates(config, cluster, gpus):
        result.tried += 1
        parallel, m = candidate.parallel, candidate.batch.micro_batches
        bubble = pipeline_bubble(parallel, m) if parallel.pp > 1 else 0.0
        slowest = result.found[-1].seconds if len(result.found) == most else math.inf
        if least / (1 - bubble) >= slowest or (parallel.recompute == "layer" and fits):
            result.too_slow += 1  # of otherwise equal layouts the one that keeps everything comes first
            continue
        fits = _try(result, candidate, parts, cluster, gpus, most, imbalance)
    refined = {_key(candidate): candidate for found in result.found for candidate in other_schedules(found.config)}
    for candidate in refined.values():
        result.tried += 1
        _try(result, candidate, parts, cluster, gpus, most, imbalance)
    if not result.tried:
        raise InputError(f"--gpus {gpus}", _no_layout(config, gpus), "change the number of GPUs, or batch.sequences")
    if not result.found:
        assert result.smallest is not None
        size, smallest = result.smallest
        reason = f"none of {result.tried:,} layouts fits {cluster.usable_bytes / 2**30:.0f} GiB; the smallest needs {size / 2**30:.0f} GiB"
        raise InputError(
            f"--gpus {gpus}", f"{reason} ({describe(smallest, gpus)})", "take more GPUs, larger ones, or a smaller model"
        )
    return result


def _key(config: Config) -> tuple[Parallel, int]:
    """Equal for equal layouts."""
    return config.parallel, config.batch.micro_batches


def _try(
    result: Search, candidate: Config, parts: tuple[Part, ...], cluster: Cluster, gpus: int, most: int, imbalance: float
) -> bool:
    """Adds a layout to the result if it fits and is fast; whether it fits."""
    plans = [Plan(in_layout(part.config, candidate), gpus) for part in parts]
    held = [worst_rank(plan, imbalance, cluster.efficiency.fragmentation) for plan in plans]
    needed = max(memory.total for _, memory in held)
    if needed > cluster.usable_bytes:
        result.too_large += 1
        if result.smallest is None or needed < result.smallest[0]:
            result.smallest = needed, candidate
        return False
    planned = (
        PlannedPart(part.steps, plan, memory, rank, step_time(plan, cluster, imbalance))
        for part, plan, (rank, memory) in zip(parts, plans, held, strict=True)
    )
    _enter(result.found, Found(candidate, tuple(planned)), most)
    return True


def in_layout(config: Config, other: Config) -> Config:
    """A run in the layout and with the micro-batches of another."""
    batch = config.batch.model_copy(update={"micro_batches": other.batch.micro_batches})
    return config.model_copy(update={"parallel": other.parallel, "batch": batch})


def _enter(best: list[Found], found: Found, most: int) -> None:
    """Keeps the fastest layouts; of those with the same ranks along all axes the fastest only."""
    same = next((index for index, one in enumerate(best) if one.axes == found.axes), None)
    if same is not None:
        if found.seconds >= best[same].seconds:
            return
        del best[same]
    best.append(found)
    best.sort(key=lambda one: one.seconds)
    del best[most:]


def can_be_laid_out(config: Config, cluster: Cluster, gpus: int) -> bool:
    """Whether the rules allow any layout of so many GPUs; memory is not asked."""
    return any(True for _ in candidates(_bare(config), cluster, gpus))


def _bare(config: Config) -> Config:
    """The run without its own layout; the kind of context parallelism stays."""
    return config.model_copy(update={"parallel": Parallel(context=config.parallel.context)})


# What there is to try -----------------------------------------------------------------------------------------------------


def candidates(config: Config, cluster: Cluster, gpus: int) -> Iterator[Config]:
    """Every layout that the trainer would accept, as the run's config with it."""
    for tp in divisors(gpus):
        if tp > cluster.devices_per_node or tensor_obstacles(config, tp):
            continue
        for stream in divisors(math.gcd(config.model.streams.count, gpus // tp)):
            for cp in divisors(gpus // tp // stream):
                if cp > max(1, config.data.sequence_length // LEAST_TOKENS):
                    break
                shared = _with(config, {"tp": tp, "stream": stream, "cp": cp}, 1)
                if stream_obstacles(shared, stream) or context_obstacles(shared, cp):
                    continue
                yield from _pipelines(shared, gpus)


def _pipelines(config: Config, gpus: int) -> Iterator[Config]:
    parallel = config.parallel
    rest = gpus // (parallel.tp * parallel.stream * parallel.cp)
    for pp in divisors(rest):
        dp = rest // pp
        if pp > config.model.layers:
            break
        for size in _sizes(config, dp):
            micro_batches = config.batch.sequences // dp // size
            if not batch_fits(config.batch, micro_batches, dp):
                continue
            for schedule, stages in _schedules(config, pp):
                layout = {"pp": pp, "dp": dp, "schedule": schedule, "virtual_stages": stages}
                candidate = _with(config, layout, micro_batches)
                if not pipeline_obstacles(candidate, pp):
                    yield from _experts(candidate, dp)


def _sizes(config: Config, dp: int) -> list[int]:
    """Sequences of a micro-batch on one rank."""
    if config.batch.sequences % dp:
        return []
    most = MOST_SEQUENCES if config.parallel.cp == 1 else 1  # who shares a sequence has no use for a second one at a time
    return [size for size in divisors(config.batch.sequences // dp) if size <= most]


def _schedules(config: Config, pp: int) -> Iterator[tuple[str, int]]:
    """The schedule of least memory, and interleaved ones: two stages a rank, and the most that share the layers evenly."""
    yield "1f1b", 1
    if pp == 1:
        return
    most = min(config.model.layers // pp, MOST_STAGES)
    even = max((stages for stages in range(2, most + 1) if config.model.layers % (pp * stages) == 0), default=2)
    yield from (("interleaved", stages) for stages in sorted({2, even}) if stages <= most)


def other_schedules(config: Config) -> Iterator[Config]:
    """The same layout with each schedule that `candidates` leaves out."""
    pp, layers = config.parallel.pp, config.model.layers
    tried = set(_schedules(config, pp))
    options = [("interleaved", stages) for stages in range(2, min(layers // pp, MOST_STAGES) + 1)]
    if config.compile != "on":
        options += [(schedule, 1) for schedule in SPLIT_BACKWARD]
    for schedule, stages in options:
        other = changed(config, {"schedule": schedule, "virtual_stages": stages})
        if pp > 1 and (schedule, stages) not in tried and not pipeline_obstacles(other, pp):
            yield other


def _experts(config: Config, dp: int) -> Iterator[Config]:
    parallel = config.parallel
    for etp in sorted({1, parallel.tp}) if config.model.experts.count > 1 else (1,):
        split = changed(config, {"etp": etp})
        if etp > 1 and width_obstacles(split, etp):
            continue
        ranks = expert_ranks(split.parallel, dp)
        for ep in divisors(math.gcd(config.model.experts.count, ranks)):
            if not expert_obstacles(split, ep, ranks):
                yield from _states(changed(split, {"ep": ep}), dp)


def _states(config: Config, dp: int) -> Iterator[Config]:
    """ZeRO stages and recomputation."""
    parallel, streams = config.parallel, config.model.streams.count
    shards = dp * parallel.stream * parallel.cp
    stages = [0] if shards == 1 else [0, 1]
    if config.engine.deepspeed:  # settings that plain torch would leave unused
        stages = [1]
    if shards > 1 and parallel.pp == parallel.ep == 1 and config.compile != "on" and config.optimizer.name != "muon":
        stages.append(3)
    modes = ["none", "layer"] + ["stream"] * (
        streams > 1 and streams != parallel.stream
    )  # "layer" directly behind "none": see search
    for zero in stages:
        for recompute in modes:
            yield changed(config, {"zero_stage": zero, "recompute": recompute})


def _with(config: Config, layout: dict[str, Any], micro_batches: int) -> Config:
    """The run in another layout, of which tp, stream and cp stay."""
    kept = {axis: getattr(config.parallel, axis) for axis in ("context", "tp", "stream", "cp")}
    parallel = Parallel().model_copy(update={**kept, **layout})
    batch = config.batch.model_copy(update={"micro_batches": micro_batches})
    return config.model_copy(update={"parallel": parallel, "batch": batch})


def changed(config: Config, layout: dict[str, Any]) -> Config:
    """The run with some settings of the layout changed."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=layout)})


def _no_layout(config: Config, gpus: int) -> str:
    sequences = config.batch.sequences
    return (
        f"no layout works: {sequences} sequences a step, {config.model.layers} layers, {config.model.heads} heads on {gpus} GPUs"
    )


def describe(config: Config, gpus: int) -> str:
    """A layout in one line."""
    parallel = config.parallel
    axes = [f"{axis} {size}" for axis in ("tp", "pp", "ep", "etp", "cp", "stream", "dp") if (size := getattr(parallel, axis)) > 1]
    if parallel.pp > 1:
        stages = f" x {parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
        axes.append(f"{parallel.schedule}{stages}")
    sequences = config.batch.sequences // config.batch.micro_batches // (parallel.dp or 1)
    several = "es" * (config.batch.micro_batches > 1)
    axes.append(f"{config.batch.micro_batches} micro-batch{several} of {sequences} a rank")
    axes.append(f"ZeRO {parallel.zero_stage}")
    if parallel.recompute != "none":
        axes.append(f"recompute {parallel.recompute}")
    return ", ".join(axes)
