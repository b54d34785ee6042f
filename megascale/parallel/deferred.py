"""Weight gradients that wait: the backward pass of a stage computes the gradients of its inputs, and those of its large weights later.

Zero-bubble schedules (arXiv 2401.10241, section 2) fill a pipeline's bubble with the second half. torch's own way of splitting a backward
pass walks the graph twice and runs again what lies between the halves: recomputed layers, custom operators, collectives. Here, as in
Megatron-LM's and the authors' weight gradient store, the layers themselves keep what a weight's gradient is made of, the layer's input and
its output's gradient, and one walk is enough.

Only matrix products wait: the projections of attention, feed-forward layers, experts. Norms, biases, prefixes, routers, AltUp's
coefficients, embedding and head (whose loss computes its gradients in the forward pass) get theirs at once. N rows, i inputs, o outputs,
E experts, M rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.kernels.grouped import grouped_linear, grouped_linear_dgrad, grouped_linear_wgrad
from megascale.model.attention import Attention
from megascale.model.layers import SwiGLU
from megascale.model.routing import Experts

Compute = Callable[[], Tensor]
"""Computes a weight's gradient, of one use of the weight in one micro-batch."""


class WeightGradients:
    """Those of one stage that its backward pass, so far, has left to be computed."""

    def __init__(self) -> None:
        self.waiting: dict[Tensor, list[Compute]] = {}

    def add(self, weight: Tensor, compute: Compute) -> None:
        """A use of a weight is differentiated but for the weight. Adds, where a weight was used several times (stream by stream)."""
        self.waiting.setdefault(weight, []).append(compute)

    def take(self) -> Callable[[], None]:
        """All that wait, as the function that computes and accumulates them: what torch's pipeline stages call a `dw_builder`."""
        waiting, self.waiting = self.waiting, {}
        return partial(_accumulate, waiting)


def _accumulate(waiting: dict[Tensor, list[Compute]]) -> None:
    while waiting:  # each lets its activations go before the next is computed
        weight = next(iter(waiting))
        uses = waiting.pop(weight)
        with torch.no_grad():
            gradient = uses[0]()
            for compute in uses[1:]:
                gradient = gradient + compute()
        # through autograd's own accumulation, with all hooks on it: engines cannot tell the difference
        torch.autograd.backward(weight, gradient)


@dataclass(frozen=True)
class _Use:
    """A weight hidden from autograd, whose hooks on it would else see a gradient of nothing; and where its own gradient goes."""

    weight: Tensor
    later: WeightGradients


class _Linear(torch.autograd.Function):
    """F.linear for x [..., i], whose backward pass leaves the weight's gradient to a `WeightGradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, use: _Use) -> Tensor:
        ctx.save_for_backward(x)
        ctx.use = use
        return F.linear(x, use.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), use, rows = ctx.saved_tensors, ctx.use, grad.reshape(-1, grad.shape[-1])
        use.later.add(use.weight, partial(_linear_wgrad, rows, x))
        grad_x = (rows @ use.weight).view(x.shape)
        return grad_x, rows.sum(0) if ctx.needs_input_grad[1] else None, None


def _linear_wgrad(rows: Tensor, x: Tensor) -> Tensor:
    """[o, i] of the output's gradient [N, o] and the input [..., i]; the product that torch's own backward pass forms."""
    return rows.t() @ x.reshape(-1, x.shape[-1])


class _GroupedLinear(torch.autograd.Function):
    """`grouped_linear`, whose backward pass leaves the weight's gradient to a `WeightGradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, use: _Use) -> Tensor:
        ctx.save_for_backward(x, ends)
        ctx.use = use
        return grouped_linear(x, use.weight, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, ends), use, grad = ctx.saved_tensors, ctx.use, grad.contiguous()
        use.later.add(use.weight, partial(grouped_linear_wgrad, grad, x, ends))
        return grouped_linear_dgrad(grad, use.weight, ends), None, None


def _waits(x: Tensor, weight: Tensor) -> bool:
    # an input without a gradient, behind frozen parameters, would leave the function out of the backward pass
    return torch.is_grad_enabled() and x.requires_grad and weight.requires_grad


def _linear(module: nn.Linear, later: WeightGradients, x: Tensor) -> Tensor:
    if not _waits(x, module.weight):
        return F.linear(x, module.weight, module.bias)
    return _Linear.apply(x, module.bias, _Use(module.weight, later))


def _grouped_linear(later: WeightGradients, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if not _waits(x, weight):
        return grouped_linear(x, weight, ends)
    return _GroupedLinear.apply(x.contiguous(), ends, _Use(weight, later))


def defer_weight_gradients(decoder: nn.Module) -> WeightGradients:
    """Make the large matrix products of a stage leave their weights' gradients for later, in place. Not for layers to be compiled."""
    later = WeightGradients()
    for module in decoder.modules():
        if isinstance(module, Experts):
            module.multiply = partial(_grouped_linear, later)
        if isinstance(module, (Attention, SwiGLU)):
            for child in module.children():
                if isinstance(child, nn.Linear):
                    child.forward = partial(_linear, child, later)  # type: ignore[method-assign]
    return later
