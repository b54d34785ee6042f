"""`python -m benchmarks step|memory`: shapes, and what the memory of a step is made of."""

from __future__ import annotations

import argparse

import pytest
import torch

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
