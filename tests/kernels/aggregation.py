"""Inputs of the stream aggregation, and what it should make of them, straight from the paper's formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("y", "weights", "grad x", "grad hidden", "grad hidden bias", "grad mix weight", "grad mix bias")
Upstream = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    """T tokens, P streams, of them `here` (none: all) from `first` on; d width, h hidden width, eps; whether the loss uses the weights."""

    tokens: int = 5
    streams: int = 3
    width: int = 6
    inner: int = 4
    first: int = 0
    here: int | None = None
    smoothing: float = 0.1
    weights_used: bool = True

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """x, hidden, hidden_bias, mix_weight, mix_bias. The scores differ enough for weights from even to one-sided."""
        draw = torch.Generator().manual_seed(self.tokens * 100 + self.streams)
        here = self.streams if self.here is None else self.here
        shapes = (
            (self.tokens, here, self.width),
            (self.tokens, self.inner),
            (self.inner,),
            (self.streams, self.inner),
            (self.streams,),
        )
        scales = 1, 1, 1, 2 * self.inner**-0.5, 1
        tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) * s for shape, s in zip(shapes, scales, strict=True)]
        return [x.to(device, dtype).requires_grad_() for x in tensors]

    def upstream(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Upstream:
        """Gradients of y and, in fp32 or wider, of the weights."""
        draw = torch.Generator().manual_seed(7)
        of_y = torch.randn(self.tokens, self.width, generator=draw, dtype=torch.float64).to(device, dtype)
        of_weights = torch.randn(self.tokens, self.streams, generator=draw, dtype=torch.float64)
        return of_y, of_weights.to(device, torch.promote_types(dtype, torch.float32)) if self.weights_used else None


def defined(
    x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, case: Case
) -> tuple[Tensor, Tensor]:
    """y and the weights, one token and one stream at a time."""
    active = [z / (1 + (-z).exp()) for z in hidden + hidden_bias]
    powers = [[(mix_weight[p] @ a + mix_bias[p]).exp() for p in range(case.streams)] for a in active]
    rows = [[power / sum(row) * (1 - case.smoothing) + case.smoothing / case.streams for power in row] for row in powers]
    y = [sum(row[case.first + p] * one[p] for p in range(x.shape[1])) for row, one in zip(rows, x, strict=True)]
    return torch.stack(y), torch.stack([torch.stack(row) for row in rows])


def with_gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor], upstream: Upstream) -> list[Tensor]:
    """The outputs and the gradients of the inputs, for gradients of the outputs (none: that output is not used)."""
    used = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if grad is not None]
    grads = torch.autograd.grad([out for out, _ in used], inputs, [grad for _, grad in used])
    return [*(out.detach() for out in outputs), *grads]


def exact(case: Case, inputs: list[Tensor], upstream: Upstream) -> list[Tensor]:
    """Outputs and gradients in fp64, on the CPU."""
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    grads = upstream[0].cpu().double(), None if upstream[1] is None else upstream[1].cpu().double()
    return with_gradients(defined(*wide, case), wide, grads)  # type: ignore[arg-type]
