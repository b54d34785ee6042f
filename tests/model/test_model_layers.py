"""RMSNorm, SwiGLU and the rotary embedding, against their definitions and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megascale.config.schema import Rotary
from megascale.model.layers import RMSNorm, SwiGLU, rotary_frequencies, rotary_table, rotate


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_rms_norm_is_its_definition_in_wide_numbers(dtype: torch.dtype, tolerance: float) -> None:
    norm = RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 16))
    x = (torch.randn(5, 3, 16) * 7).to(dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_of_nothing_is_nothing() -> None:
    assert not RMSNorm(8, 1e-6)(torch.zeros(2, 8)).any()


def test_swiglu_is_its_definition() -> None:
    layer, x = SwiGLU(8, 12), torch.randn(3, 2, 8)
    expected = (F.silu(x @ layer.gate.weight.t()) * (x @ layer.up.weight.t())) @ layer.down.weight.t()
    torch.testing.assert_close(layer(x), expected)


LLAMA3 = Rotary(theta=500000.0, scaling="llama3", factor=8.0, original_context=8192)
YARN = Rotary(theta=10000.0, scaling="yarn", factor=4.0, original_context=4096)
LONG_YARN = Rotary(theta=1e6, scaling="yarn", factor=32.0, original_context=2048, beta_fast=16.0, beta_slow=2.0)


@pytest.mark.parametrize("rotary", [LLAMA3, YARN, LONG_YARN], ids=["llama3", "yarn", "long yarn"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_scaled_frequencies_are_those_of_transformers(rotary: Rotary, head_dim: int) -> None:
    parameters = {
        "rope_type": rotary.scaling,
        "rope_theta": rotary.theta,
        "factor": rotary.factor,
        "original_max_position_embeddings": rotary.original_context,
        "low_freq_factor": rotary.low_frequency_factor,
        "high_freq_factor": rotary.high_frequency_factor,
        "beta_fast": rotary.beta_fast,
        "beta_slow": rotary.beta_slow,
    }
    context = int(rotary.original_context * rotary.factor)
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=context)
    expected, factor = ROPE_INIT_FUNCTIONS[rotary.scaling](config, "cpu")
    frequencies, scale = rotary_frequencies(head_dim, rotary)
    torch.testing.assert_close(frequencies.float(), expected, rtol=1e-5, atol=0)
    assert scale == pytest.approx(factor)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_a_factor_of_one_scales_nothing(scaling: str) -> None:
    plain, _ = rotary_frequencies(32, Rotary())
    scaled, scale = rotary_frequencies(32, Rotary(scaling=scaling))  # type: ignore[arg-type]
    torch.testing.assert_close(scaled, plain)
    assert scale == 1.0


def test_plain_frequencies() -> None:
    frequencies, scale = rotary_frequencies(8, Rotary(theta=10000.0))
    torch.testing.assert_close(frequencies, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64))
    assert scale == 1.0


@given(shift=st.integers(0, 100_000), first=st.integers(0, 500), second=st.integers(0, 500))
def test_scores_depend_on_the_distance_alone(shift: int, first: int, second: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 16, generator=generator) for _ in range(2))

    def score(a: int, b: int) -> torch.Tensor:
        return (rotate(q, *table(a)) * rotate(k, *table(b))).sum(-1)

    def table(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_table(torch.tensor([position]), 16, Rotary())

    torch.testing.assert_close(score(first, second), score(first + shift, second + shift), rtol=1e-4, atol=1e-4)


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(1, 2, 8)
    assert torch.equal(rotate(x, *rotary_table(torch.tensor([0]), 8, Rotary())), x)
