"""The head's cross entropy in chunks: the one of torch, with its gradients, at any chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.model import loss
from megascale.model.loss import IGNORED, linear_cross_entropy


def inputs(
    tokens: int, ids: int = 11, width: int = 6, dtype: torch.dtype = torch.float64, ignored: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(ids, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(ids, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[:ignored]] = IGNORED
    return x, weight, labels


@pytest.fixture(params=[1, 3, 7, 2048], ids="chunk {}".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loss, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("ignored", [0, 4, 13])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_value_and_gradients_are_those_of_torch(chunk: int, dtype: torch.dtype, tolerance: float, ignored: int) -> None:
    x, weight, labels = inputs(13, dtype=dtype, ignored=ignored)
    scale = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32))
    total, token_losses = linear_cross_entropy(x, weight, labels, scale)
    found = [total.detach(), token_losses, *torch.autograd.grad(total, (x, weight))]

    wide_x, wide_weight = (y.detach().double().requires_grad_() for y in (x, weight))
    expected_losses = F.cross_entropy(wide_x @ wide_weight.t(), labels, reduction="none", ignore_index=IGNORED)
    expected_total = 0.3 * expected_losses.sum()
    expected = [expected_total.detach(), expected_losses.detach(), *torch.autograd.grad(expected_total, (wide_x, wide_weight))]
    for got, true in zip(found, expected, strict=True):
        assert (got.double() - true).abs().max() <= tolerance * max(true.abs().max().item(), 1)
    assert not token_losses[labels == IGNORED].any()
    assert token_losses.dtype == torch.promote_types(dtype, torch.float32)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 2)
    x, weight, labels = inputs(5, ids=4, width=3, ignored=1)
    scale = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, labels, scale)[0], (x, weight))


@settings(max_examples=20)
@given(factor=st.floats(0.01, 100), scale=st.floats(0.001, 10))
def test_the_gradient_follows_the_scale_and_the_incoming_gradient(factor: float, scale: float) -> None:
    x, weight, labels = inputs(6)
    unit, _ = linear_cross_entropy(x, weight, labels, torch.tensor(1.0, dtype=torch.float64))
    scaled, _ = linear_cross_entropy(x, weight, labels, torch.tensor(scale, dtype=torch.float64))
    before, after = torch.autograd.grad(unit, (x, weight)), torch.autograd.grad(scaled * factor, (x, weight))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a * (scale * factor))


def test_very_large_logits_stay_finite() -> None:
    x = torch.full((3, 2), 300.0, requires_grad=True)
    weight = torch.tensor([[200.0, 0.0], [0.0, 200.0], [-200.0, 0.0]], requires_grad=True)
    total, losses = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2]), torch.ones(()))
    total.backward()
    assert torch.isfinite(losses).all()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_nothing_is_kept_for_the_backward_pass_without_gradients() -> None:
    x, weight, labels = inputs(5)
    total, _ = linear_cross_entropy(x.detach(), weight.detach(), labels, torch.ones((), dtype=torch.float64))
    assert not total.requires_grad


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_costs_no_gradient(frozen: str) -> None:
    x, weight, labels = inputs(9)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, labels, torch.ones(()))[0], (x, weight))
    (x if frozen == "x" else weight).requires_grad_(False)
    total, _ = linear_cross_entropy(x, weight, labels, torch.ones(()))
    kept = [tensor for tensor in total.grad_fn.saved_tensors if tensor is not None]
    total.backward()
    trained, gradient = (weight, expected[1]) if frozen == "x" else (x, expected[0])
    assert torch.equal(trained.grad, gradient)
    assert [tensor.shape for tensor in kept] == [trained.shape]
