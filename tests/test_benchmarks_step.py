"""`python -m benchmarks step|memory`: shapes, and what the memory of a step is made of."""

from __future__ import annotations

import argparse
import math
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.memory import NAMES, component_row
from benchmarks.step import Shape, axes, plain
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.model.accounting import flops_per_token

TINY = Shape(width=64, layers=2, vocabulary=96, batch=2, length=32, precision="bf16", device="cpu")


def shape_of(*words: str) -> Shape:
    parser = argparse.ArgumentParser()
    Shape.add_arguments(parser)
    return Shape.of(parser.parse_args(list(words)))


def test_a_gpu_gets_a_larger_model_unless_it_is_told() -> None:
    assert (shape_of("--device", "cpu").width, shape_of("--device", "cuda").width) == (512, 2048)
    assert shape_of("--device", "cuda", "--width", "128").width == 128


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_experts_and_blocks_cost_the_flops_of_the_plain_model(device: str) -> None:
    shape = shape_of("--device", device)
    models = axes(plain(shape), shape)
    flops = {name: flops_per_token(resolve(Config(model=model)).model, shape.length / 2) for name, model in models.items()}
    for name, value in flops.items():
        streams = models[name].streams.count
        assert value / flops["plain"] == pytest.approx(streams, rel=0.02 if streams == 1 else 0.2)


@pytest.mark.parametrize("name", list(axes(plain(TINY), TINY)))
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_the_components_add_up_to_the_peak(name: str, recompute: str) -> None:
    row = component_row(name, TINY, recompute, torch.device("cpu"))
    parts = {part: row[part] for part in NAMES}
    assert sum(parts.values()) == pytest.approx(row["alive_mib"])
    assert all(value >= 0 for value in parts.values())
    has = {part for part, value in parts.items() if value}
    if recompute == "none":
        assert ("experts" in has, "feed_forward" in has) == (("E=8" in name), ("E=8" not in name))
        assert "aggregator" not in has or "P=2" in name


def test_on_a_gpu_one_model_is_there_at_a_time_and_one_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    seen: list[int] = []

    def make(fails: bool) -> Callable[[], None]:
        model = nn.Linear(1, 1)
        model.itself = [model]  # as compiled modules do
        alive.add(model)
        seen.append(len(alive))
        if fails:
            raise torch.OutOfMemoryError("no room")
        return lambda: model(torch.zeros(1))

    monkeypatch.setattr(step, "milliseconds", lambda device, runs, rounds: dict.fromkeys(runs, 2.0))
    monkeypatch.setattr(step, "peak_allocated_mib", lambda device, run: 3.0)
    makers = {name: (make, (name == "large",)) for name in ("plain", "large", "small")}
    found = step.measured(torch.device("cuda"), makers, 1, memory=True)
    assert seen == [1, 1, 1]
    assert found["plain"] == found["small"] == {"ms": 2.0, "peak_mib": 3.0}
    assert math.isnan(found["large"]["ms"]) and "no room" in found["large"]["failed"]


def test_memory_is_that_of_the_batch_that_the_step_is_timed_with() -> None:
    shape = Shape(width=64, layers=2, vocabulary=256, batch=16, length=32, precision="bf16", device="cuda")
    rows = {batch: component_row("P=8", replace(shape, batch=batch), "none", torch.device("cpu")) for batch in (8, 16)}
    assert [row["sequences"] for row in rows.values()] == [1, 2]
    assert rows[16]["alive_mib"] == pytest.approx(2 * rows[8]["alive_mib"], rel=0.2)
