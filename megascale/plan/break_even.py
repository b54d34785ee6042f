"""What a_K two residual blocks (AltUp, arXiv 2301.13310) need to be worth what they cost: few FLOPs, and passes over memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megascale.config.schema import Batch, Config, Data, Model, Run, Schedule
from megascale.plan.axis_search import AxisSearch
from megascale.plan.rank import Plan
from megascale.plan.time import step_time


@dataclass(frozen=True)
class BreakEven:
    """For the best design with one block and its twin with two; pairs are of the law that asks least and the one that asks most."""

    by_flops: tuple[float, float]
    """a_K at which both have one loss for the same FLOPs"""
    by_time: tuple[float, float]
    """for the same time"""
    longer: float
    """time of a training token of the twin over the other's, without messages and optimizer"""


def break_even(found: AxisSearch) -> BreakEven | None:
    """None where no two blocks were tried, or the best design with one has no twin with two."""
    blocks = found.table.sizes.blocks
    best = found.best(blocks == 1)
    if best is None or not (blocks == 2).any():
        return None
    models = found.table.models
    twin = next((i for i, one in enumerate(models) if one.name == models[best].name[:-1] + "2"), None)
    if twin is None:
        return None
    longer = _seconds(models[twin].model, found) / _seconds(models[best].model, found)
    by_flops, by_time = (_needed(found, best, twin, float(d)) for d in (found.tokens[twin], found.tokens[best] / longer))
    return BreakEven(by_flops, by_time, longer)


def _seconds(model: Model, found: AxisSearch) -> float:
    """Of a sequence's forward and backward pass on one device, however much memory it takes."""
    config = Config(
        run=Run(name="one"),
        model=model,
        data=Data(sequence_length=found.work.sequence),
        batch=Batch(sequences=1),
        schedule=Schedule(steps=1),
        precision="bf16",
    )
    time = step_time(Plan(config, 1), found.device)
    return time.products + time.attention + time.experts + time.passes


def _needed(found: AxisSearch, best: int, twin: int, trained: float) -> tuple[float, float]:
    """a_K at which the twin, trained on so many tokens, has the best one's loss."""
    sizes, tokens = found.table.sizes.at(twin), np.array([trained])
    without = sizes.parameters / found.own.worth(sizes.blocks).middle
    needed = []
    for one in found.judged:
        n, low, high = without * one.ratio.middle[twin], 0.5, 4.0
        for _ in range(50):
            middle = np.sqrt(low * high)
            above = one.base.loss(n * middle, tokens, sizes.expansion, found.limits.unique)[0] > one.loss[best]
            low, high = (middle, high) if above else (low, middle)
        needed.append(float(high))
    return min(needed), max(needed)
