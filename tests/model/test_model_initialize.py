"""Initial weights: a pure function of seed and name, the same for whoever draws which rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.model.initialize import ROWS, generator, initial_std, normal_rectangle
from tiny import tiny_decoder, tiny_model

EVERYTHING = {
    "streams": {"count": 2},
    "experts": {"count": 4, "per_token": 2, "shared": 1},
    "altup": {"blocks": 2},
    "qkv_bias": True,
}


@settings(max_examples=30)
@given(rows=st.integers(1, 3 * ROWS), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)), matrix=st.booleans())
def test_any_rectangle_is_the_slice_of_the_whole(rows: int, cut: tuple[float, float], matrix: bool) -> None:
    shape = (rows, 3) if matrix else (min(rows, 9), 2, 3)
    start, stop = sorted(int(x * (shape[0] - 1)) for x in cut)
    whole = normal(7, "name", shape, 0.02)
    assert whole.shape == shape
    sizes = (stop + 1 - start, *shape[1:-1], 2)
    part = normal_rectangle(7, "name", shape, 0.02, (start, *(0,) * (len(shape) - 2), 1), sizes)
    assert torch.equal(part, whole[start : stop + 1, ..., 1:])


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    return normal_rectangle(seed, name, shape, std, (0,) * len(shape), shape)


def test_weights_depend_on_seed_and_name_alone() -> None:
    shape = (4, 5)
    torch.manual_seed(1)
    first = normal(1, "a", shape, 1.0)
    torch.manual_seed(2)
    assert torch.equal(normal(1, "a", shape, 1.0), first)
    assert not torch.equal(normal(2, "a", shape, 1.0), first)
    assert not torch.equal(normal(1, "b", shape, 1.0), first)


def test_generators_of_different_keys_differ() -> None:
    drawn = {torch.rand((), generator=generator(*key)).item() for key in [(1, "a"), (1, "a", 0), (2, "a"), (12, 3), (1, 23)]}
    assert len(drawn) == 5


def test_the_same_weights_whatever_the_other_features_are() -> None:
    plain, full = tiny_decoder(tiny_model()), tiny_decoder(tiny_model(**EVERYTHING))
    shared = dict(full.named_parameters())
    common = [name for name, _ in plain.named_parameters() if name in shared and "feed_forward." not in name]
    assert len(common) == 2 * 6 + 3
    for name in common:
        assert torch.equal(plain.get_parameter(name), shared[name])


def test_the_distribution_of_every_parameter() -> None:
    model = tiny_model(width=64, layers=8, **EVERYTHING)
    for name, parameter in tiny_decoder(model).named_parameters():
        std = initial_std(name, model)
        if std is None:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("norm.weight")))), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.15), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_projections_back_into_the_residual_are_smaller_by_the_root_of_twice_the_layers() -> None:
    model = tiny_model(layers=8, **EVERYTHING)
    back = {"layers.0.attention.o.weight", "layers.0.feed_forward.down", "layers.0.feed_forward.shared.down.weight"}
    names = {name for name, _ in tiny_decoder(model).named_parameters()}
    assert back <= names
    small = {name for name in names if name.startswith("layers.0.") and initial_std(name, model) == model.init_std / 4}
    assert small == back
