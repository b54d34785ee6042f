"""AltUp's metrics: divergence of the blocks and the gains of the mixes, by definition, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megascale.model.altup import AltUpResidual
from megascale.train.altup_health import mix_gains
from megascale.train.validate import validate
from runs import build_parts, tiny_config
from tiny import tiny_model

READS, COEFFICIENTS = ("old", "predicted"), ("static", "token")


@given(layers=st.integers(1, 5), blocks=st.integers(2, 4), seed=st.integers(0, 99))
def test_gains_are_those_of_the_products(layers: int, blocks: int, seed: int) -> None:
    mixes = torch.randn(layers, blocks, blocks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = mix_gains(mixes)
    for layer in range(layers):
        before, after = torch.eye(blocks).double(), torch.eye(blocks).double()
        for mix in mixes[: layer + 1]:
            before = mix @ before
        for mix in mixes[layer:]:
            after = mix @ after
        assert found["forward_gain"][layer].item() == pytest.approx(max(row.abs().sum().item() for row in before))
        assert found["backward_gain"][layer].item() == pytest.approx(max(column.abs().sum().item() for column in after.T))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@torch.no_grad()
def test_a_layers_mix_is_its_way_from_blocks_to_blocks(read: str, coefficients: str) -> None:
    """For one token: with the update held at zero, x' = A x."""
    model = tiny_model(width=8, altup={"blocks": 3, "read": read, "coefficients": coefficients})
    module, generator = AltUpResidual(model, 1).double(), torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = torch.randn(1, 1, 3, 8, generator=generator, dtype=torch.float64)
    parts, update = module.split(state), torch.zeros(1, 1, 8).double()
    expected: Tensor = module(parts, update)
    torch.testing.assert_close(torch.einsum("ik,tpkd->tpid", module.mixing(parts, update), state), expected)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_validation_reports_the_health_of_the_blocks(tmp_path: Path, tiny_corpus: Path, coefficients: str) -> None:
    altup = f"model.altup={{blocks: 2, coefficients: {coefficients}}}"
    config = tiny_config(tmp_path, tiny_corpus, "model.layers=4", altup, "validation={every: 1, sequences: 1}")
    parts = build_parts(config)
    start = validate(parts.stages, parts.data, parts.config, parts.mesh)
    names = {f"altup/layer_{i:02d}/{name}" for i in range(4) for name in ("divergence", "forward_gain", "backward_gain")}
    assert {name for name in start if name.startswith("altup/")} == names | {"altup/gain"}
    # the identity: equal blocks, mixes that change nothing
    assert {name: value for name, value in start.items() if name in names} == {n: 0.0 if "div" in n else 1.0 for n in names}
    assert start["altup/gain"] == 1
    with torch.no_grad():
        for decoder in parts.stages.modules():
            for parameter in (p for name, p in decoder.named_parameters() if ".residual." in name):
                parameter.add_(torch.linspace(0.1, 0.5, parameter.numel()).view_as(parameter))
    moved = validate(parts.stages, parts.data, parts.config, parts.mesh)
    assert {name for name in names | {"altup/gain"} if moved[name] == start[name]} == set()
    assert parts.stages.modules()[0].training


def test_sequence_altup_reports_its_gain(tmp_path: Path, tiny_corpus: Path) -> None:
    altup = "model.altup={form: sequence}"
    config = tiny_config(tmp_path, tiny_corpus, "model.layers=4", altup, "validation={every: 1, sequences: 1}")
    parts = build_parts(config)
    with torch.no_grad():
        parts.stages.modules()[0].get_parameter("layers.1.residual.correct").fill_(0.5)
    found = validate(parts.stages, parts.data, parts.config, parts.mesh)
    assert {name: value for name, value in found.items() if name.startswith("altup/")} == {"altup/gain": 1.25}
