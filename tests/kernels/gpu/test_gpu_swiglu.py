"""The SwiGLU kernels against PyTorch: within rounding, and rows without an expert neither read nor written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_good, choices, every_dtype, normal, poison, twice, uncontiguous
from torch import Tensor

from megascale.kernels import swiglu_triton as kernels
from megascale.kernels.dispatch import sort_copies_reference

every_shape = pytest.mark.parametrize(
    ("number", "k", "width"), [(5, 2, 16), (9, 1, 7), (3, 4, 768), (1, 3, 1), (2, 1, 4100), (0, 2, 8)]
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def by_definition(gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    """The result and the gradients of gate and up."""
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    out = F.silu(leaves[0]) * leaves[1]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@every_dtype
@every_shape
def test_without_weights(device: torch.device, dtype: torch.dtype, number: int, k: int, width: int) -> None:
    gate, up, grad = (normal(number * k, width, dtype=dtype, device=device, seed=s) for s in range(3))
    plain, true = (by_definition(*(x.to(t) for x in (gate, up, grad))) for t in (dtype, torch.float64))
    for rows in (lambda x: x, uncontiguous):
        inputs = [rows(x) for x in (gate, up)]
        out = twice(kernels.swiglu, *inputs)
        grad_gate, grad_up, nothing = kernels.swiglu_backward(rows(grad), *inputs)
        assert nothing is None
        for found, eager, exact in zip((out, grad_gate, grad_up), plain, true, strict=True):
            assert (found.shape, found.dtype) == (gate.shape, dtype)
            if found.numel():
                assert_as_good(found, eager, exact)


@every_dtype
@every_shape
def test_with_weights(device: torch.device, dtype: torch.dtype, number: int, k: int, width: int) -> None:
    order, place, counts = (x.to(device) for x in sort_copies_reference(choices(number, k, 3, seed=2), 3))
    ends, live = counts.cumsum(0).to(torch.int32), int(counts.sum())
    gate, up, grad = (normal(number * k, width, dtype=dtype, device=device, seed=s) for s in range(3))
    weights = normal(number, k, dtype=torch.promote_types(dtype, torch.float32), device=device, seed=4)
    weight = weights.flatten()[order[:live]][:, None]
    values = []
    for t in (dtype, torch.float64):
        part = [x[:live].to(t) for x in (gate, up, grad)]
        hidden = by_definition(*part)[0]
        dots = torch.zeros(number * k, dtype=t, device=device).index_put((order[:live],), (part[2] * hidden).sum(-1))
        _, *gradients = by_definition(*part[:2], part[2] * weight.to(t))
        values.append([hidden * weight.to(t), *gradients, dots.view(weights.shape)])
    for rows, behind in ((lambda x: x, torch.nan), (uncontiguous, 1.0)):
        for x in (gate, up, grad):
            x[live:] = behind
        inputs = [
            *(rows(x) for x in (gate, up)),
            *(torch.stack([x, x + 1], -1).flatten(-2)[..., ::2] for x in (weights, order, ends)),
        ]
        out = twice(kernels.swiglu, *inputs)
        *gradients, grad_weights = twice(kernels.swiglu_backward, rows(grad), *inputs)
        for x in (out, *gradients):
            assert (x.shape, x.dtype) == (gate.shape, dtype)
            assert x[live:].isnan().all()  # not written
        assert (grad_weights.shape, grad_weights.dtype) == (weights.shape, weights.dtype)
        assert not grad_weights[place == order.numel()].any()
        for found, eager, exact in zip((out[:live], *(x[:live] for x in gradients), grad_weights), *values, strict=True):
            if live:
                assert_as_good(found, eager, exact)


def test_offsets_of_rows_are_64_bit(device: torch.device) -> None:
    far = torch.zeros(0, dtype=torch.bfloat16, device=device).resize_(2**31 + 64).as_strided((3, 64), (2**30, 1))
    far[:] = near = normal(3, 64, dtype=torch.bfloat16, device=device)
    assert torch.equal(kernels.swiglu(far, far), kernels.swiglu(near, near))
    for a, b in zip(*(kernels.swiglu_backward(x, x, x)[:2] for x in (far, near)), strict=True):
        assert torch.equal(a, b)
