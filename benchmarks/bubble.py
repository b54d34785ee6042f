"""How long ranks of a pipeline wait under each schedule: steps of the real pipeline code whose layers sleep instead of computing.

A rank that sleeps needs no core, so a pipeline of more ranks than cores runs as one of as many machines would. What runs is
`megascale.parallel.pipeline` with torch's schedules, real decoders (with embedding and head, tiny), real sends between gloo ranks and,
where weight gradients wait, `megascale.parallel.deferred`; only a layer's arithmetic is replaced: its forward pass, the gradient of its
input and that of its weights sleep equally long.

p pipeline ranks, m micro-batches, v stages a rank.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.config.layout import pipeline_bubble
from megascale.config.resolve import resolve
from megascale.config.schema import Batch, Config, Data, Model, Parallel
from megascale.data.batches import MicroBatch
from megascale.model.attention import Packing
from megascale.model.decoder import Layer
from megascale.model.origin import Origin
from megascale.parallel.deferred import WeightGradients
from megascale.parallel.device import Device
from megascale.parallel.mesh import open_mesh
from megascale.parallel.pipeline import Stages
from megascale.parallel.world import World
from megascale.train.build import build_stages

LAYERS_A_RANK = 2
"""A rank's stages share them, so that it works equally long under every schedule."""
TOKENS = 8
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b"},
    "interleaved, v=2": {"schedule": "interleaved", "virtual_stages": 2},
    "zero_bubble": {"schedule": "zero_bubble"},
    "zero_bubble, v=2": {"schedule": "zero_bubble", "virtual_stages": 2},
    "zbv": {"schedule": "zbv"},
    "dualpipev": {"schedule": "dualpipev"},
}
"""Settings of `parallel` by name."""
FORMULAS = {
    "1f1b": "3 (p-1) / (3 m + 3 (p-1)), PipeDream-flush: arXiv 2104.04473, section 2.2",
    "interleaved, v=2": "3 (p-1) / (3 m v + 3 (p-1)): arXiv 2104.04473, section 2.2",
    "zero_bubble": "(p-1) / (3 m v + p-1), ZB-H1: arXiv 2401.10241, section 2.2",
    "zero_bubble, v=2": "(p-1) / (3 m v + p-1), ZB-H1: arXiv 2401.10241, section 2.2",
    "zbv": "(p-1) / (6 m + p-1), the wait for the first micro-batch: arXiv 2401.10241, section 6",
    "dualpipev": "2 (p-1) / (6 m + 2 (p-1)): arXiv 2412.19437, section 3.2.1",
}
"""The share of a step in which a rank waits, as `megascale.config.layout.pipeline_bubble` computes it, and where it comes from."""


@dataclass
class Sleeper:
    """Sleeps in place of a rank's arithmetic, and counts."""

    seconds: float
    """of each part of a layer's work on a micro-batch"""
    slept: float = 0.0
    """seconds, as measured: a sleep lasts a little longer than it was asked to"""
    parts: Counter[str] = field(default_factory=Counter)

    def sleep(self, *parts: str) -> None:
        """The time of these parts of a layer's work."""
        begin = time.perf_counter()
        time.sleep(self.seconds * len(parts))
        self.slept += time.perf_counter() - begin
        self.parts.update(parts)


@dataclass(frozen=True)
class SleptStep:
    """One rank's step, in seconds; begin and end by the clock that all processes of the machine share."""

    begin: float
    end: float
    slept: float
    computed: float
    """CPU time: what the schedule itself costs in Python, autograd and sends"""
    parts: dict[str, int]


class _Sleep(torch.autograd.Function):
    """x as it is; both passes sleep. The gradient of the weight, which nothing reads, is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sleeper: Sleeper, later: WeightGradients | None) -> Tensor:
        ctx.weight, ctx.sleeper, ctx.later = weight, sleeper, later
        sleeper.sleep("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.later is None:
            ctx.sleeper.sleep("input", "weight")
        else:
            ctx.sleeper.sleep("input")
            ctx.later.add(ctx.weight, partial(_sleep_weight, ctx.weight, ctx.sleeper))
        return grad, None, None, None


def _sleep_weight(weight: Tensor, sleeper: Sleeper) -> Tensor:
    sleeper.sleep("weight")
    return torch.zeros_like(weight)


def _run_layer(
    sleeper: Sleeper, later: WeightGradients | None, layer: Layer, state: Tensor, packing: Packing, origin: Origin
) -> tuple[Tensor, dict[str, Tensor]]:
    return _Sleep.apply(state, layer.attention.o.weight, sleeper, later), {}


def pipeline_config(ranks: int, schedule: str, micro_batches: int) -> Config:
    """A tiny decoder on a pipeline, with `LAYERS_A_RANK` layers a rank."""
    model = Model(vocab_size=32, width=16, layers=LAYERS_A_RANK * ranks, heads=1, ffn_width=64)
    parallel = Parallel.model_validate({"pp": ranks, "dp": 1, "zero_stage": 0, **SCHEDULES[schedule]})
    batch = Batch(sequences=micro_batches, micro_batches=micro_batches)
    return resolve(Config(model=model, parallel=parallel, batch=batch, data=Data(sequence_length=TOKENS)))


def slept_steps(rank: int, size: int, schedule: str, micro_batches: int, seconds: float, steps: int) -> list[SleptStep]:
    """Steps of this rank of a pipeline over all ranks, behind one without sleep in which the stages get to know each other."""
    config = pipeline_config(size, schedule, micro_batches)
    mesh = open_mesh(config.parallel, config.model, World(rank, size, Device(torch.device("cpu"), "gloo")))
    stages, _, _ = build_stages(config, mesh)
    assert all(len(decoder.layers) == LAYERS_A_RANK // len(stages.decoders) for decoder in stages.modules()), "an even cut"
    sleeper = Sleeper(0.0)
    for stage, decoder in stages.decoders.items():
        decoder.run_layer = partial(_run_layer, sleeper, stages.later.get(stage))
    _step(stages, sleeper, micro_batches)
    sleeper.seconds = seconds
    return [_step(stages, sleeper, micro_batches) for _ in range(steps)]


def _step(stages: Stages, sleeper: Sleeper, micro_batches: int) -> SleptStep:
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    batch = MicroBatch(tokens, tokens, torch.arange(TOKENS)[None], tokens.int())
    engine: Any = SimpleNamespace(begin=lambda: None)  # gradients are neither reduced nor used
    sleeper.slept, sleeper.parts = 0.0, Counter()
    dist.barrier()
    begin, computed = time.perf_counter(), time.process_time()
    shares = [1 / micro_batches] * micro_batches
    stages.gradients([batch] * micro_batches, shares, torch.ones(()), engine, lambda *_: None)
    return SleptStep(begin, time.perf_counter(), sleeper.slept, time.process_time() - computed, dict(sleeper.parts))


def many_slept_steps(rank: int, size: int, cases: Sequence[tuple[str, int]], seconds: float, steps: int) -> list[list[SleptStep]]:
    """`slept_steps` of several (schedule, micro-batches)."""
    return [slept_steps(rank, size, *case, seconds, steps) for case in cases]


def length(steps: Sequence[SleptStep]) -> float:
    """Of one step of all ranks: from the first rank's begin to the last one's end."""
    return max(step.end for step in steps) - min(step.begin for step in steps)


def idle_share(steps: Sequence[SleptStep]) -> float:
    """Of one step of all ranks: the share in which a rank neither sleeps in place of work nor computes, on average."""
    return 1 - statistics.mean(step.slept + step.computed for step in steps) / length(steps)


def row(
    ranks: int, schedule: str, micro_batches: int, seconds: float, by_rank: Sequence[Sequence[SleptStep]]
) -> dict[str, object]:
    """A case's shortest step beside the formula; other work on the machine only makes steps longer.

    Args:
        seconds: that each part of a layer's work sleeps.
        by_rank: the steps of each rank.
    """
    best = min(zip(*by_rank, strict=True), key=length)
    return {
        "pp": ranks,
        "micro_batches": micro_batches,
        "schedule": schedule,
        "slept_ms": round(seconds * 1e3, 3),
        "step_s": length(best),
        "cpu_s": statistics.mean(step.computed for step in best),
        "idle": idle_share(best),
        "formula": pipeline_bubble(pipeline_config(ranks, schedule, micro_batches).parallel, micro_batches),
    }
