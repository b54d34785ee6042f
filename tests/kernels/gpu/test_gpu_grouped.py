"""The expert GEMM on its device: a loop over experts, and rows that have none leak into nothing."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from megascale.kernels.grouped import grouped_linear, grouped_linear_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def value_and_gradients(function, x: Tensor, weight: Tensor, ends: Tensor, rows: int) -> list[Tensor]:
    out = function(x, weight, ends)
    grad = torch.linspace(-1, 1, rows * out.shape[1], dtype=torch.float64, device=x.device).view(rows, -1).to(out.dtype)
    behind = torch.full((x.shape[0] - rows, out.shape[1]), float("nan"), dtype=out.dtype, device=x.device)
    grads = torch.autograd.grad(out, (x, weight), torch.cat([grad, behind]))
    return [out.detach()[:rows], grads[0][:rows], grads[1]]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("counts", [(300, 0, 77, 1), (0, 0, 129), (5, 400, 90, 0)])
@pytest.mark.parametrize("spare", [0, 40])
def test_it_is_a_loop_over_experts(device: torch.device, dtype: torch.dtype, counts: tuple[int, ...], spare: int) -> None:
    generator, rows = torch.Generator().manual_seed(0), sum(counts)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    weight = torch.randn(len(counts), 32, 64, generator=generator).to(dtype).to(device).requires_grad_()
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)
    poisoned = torch.cat([x, torch.full((spare, 64), float("nan"), dtype=dtype)]).to(device).requires_grad_()
    found = value_and_gradients(grouped_linear, poisoned, weight, ends, rows)
    wide = [value.detach().double().requires_grad_() for value in (x.to(device), weight)]
    expected = value_and_gradients(grouped_linear_reference, wide[0], wide[1], ends, rows)
    for got, true in zip(found, expected, strict=True):
        assert (got.double() - true).abs().max() <= TOLERANCE[dtype] * true.abs().max()
