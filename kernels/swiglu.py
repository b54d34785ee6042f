"""SwiGLU of the experts' hidden rows, and with each row's gate folded in. M rows sorted by expert, f width, N tokens, k choices, E experts.

Where the gate goes. The layer's output is sum_c gate_c (W_down h_c). With the gate behind W_down, the backward pass reads the outputs Y
[M, d] again, for d gate = <d out, Y>, and they must be kept; with the gate on h, d gate = <d h', h> comes from what the backward pass of
SwiGLU has in registers anyway (SonicMoE, arXiv 2512.14080, section 4). For T = 32768, d = 2048, k = 8, f = 768 in bf16 that saves
2 T k d bytes = 1.07 GB of reads of 2.28 GB in the backward pass of the sum, as many bytes of kept activations in every layer, and costs 8
bytes a row. So the kernels fold it, where gates and experts are on one rank; where rows travel, gates do not, and weigh the outputs.
One rounding is in another place then: the product with the gate is rounded in h instead of in the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.kernels.fused import is_fused
from megascale.kernels.precision import widen


def _wide(*tensors: Tensor) -> list[Tensor]:
    """In fp32 or wider, and contiguous: with other strides torch's exponentials differ in the last bit."""
    return [widen(x).contiguous() for x in tensors]


def _reference_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = gate.sigmoid()
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


# Without a gate -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("megascale::swiglu", mutates_args=(), device_types="cpu")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide_gate, wide_up = _wide(gate, up)
    return (F.silu(wide_gate) * wide_up).to(gate.dtype)


@_swiglu.register_kernel("cuda")
def _(gate, up):
    from megascale.kernels.swiglu_triton import swiglu

    return swiglu(gate, up)


@_swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("megascale::swiglu_backward", mutates_args=(), device_types="cpu")
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = _reference_backward(*_wide(grad, gate, up))
    return of_gate.to(gate.dtype), of_up.to(up.dtype)


@_swiglu_backward.register_kernel("cuda")
def _(grad, gate, up):
    from megascale.kernels.swiglu_triton import swiglu_backward

    return swiglu_backward(grad, gate, up)[:2]


@_swiglu_backward.register_fake
def _(grad, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_swiglu.register_autograd(
    lambda ctx, grad: _swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# With each row's gate -------------------------------------------------------------------------------------------------


def _row_weights(weights: Tensor, order: Tensor) -> Tensor:
    return weights.flatten()[order][:, None]


def _before(ends: Tensor, rows: int) -> Tensor:
    """bool [M, 1]: rows that have an expert."""
    return (torch.arange(rows, device=ends.device) < ends[-1])[:, None]


@torch.library.custom_op("megascale::weighted_swiglu", mutates_args=(), device_types="cpu")
def _weighted(gate: Tensor, up: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    wide_gate, wide_up = _wide(gate, up)
    return (F.silu(wide_gate) * wide_up * _row_weights(weights, order)).to(gate.dtype)


@_weighted.register_kernel("cuda")
def _(gate, up, weights, order, ends):
    from megascale.kernels.swiglu_triton import swiglu

    return swiglu(gate, up, weights, order, ends)


@_weighted.register_fake
def _(gate, up, weights, order, ends):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("megascale::weighted_swiglu_backward", mutates_args=(), device_types="cpu")
def _weighted_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide_grad, wide_gate, wide_up = _wide(grad, gate, up)
    of_gate, of_up = _reference_backward(wide_grad * _row_weights(weights, order), wide_gate, wide_up)
    dots = torch.where(_before(ends, gate.shape[0]), wide_grad * F.silu(wide_gate) * wide_up, 0).sum(1)
    of_weights = torch.empty_like(weights.flatten()).scatter_(0, order, dots.to(weights.dtype))
    return of_gate.to(gate.dtype), of_up.to(up.dtype), of_weights.view(weights.shape)


@_weighted_backward.register_kernel("cuda")
def _(grad, gate, up, weights, order, ends):
    from megascale.kernels.swiglu_triton import swiglu_backward

    return swiglu_backward(grad, gate, up, weights, order, ends)


@_weighted_backward.register_fake
def _(grad, gate, up, weights, order, ends):
    return gate.new_empty(gate.shape), up.new_empty(up.shape), weights.new_empty(weights.shape)


_weighted.register_autograd(
    lambda ctx, grad: (*_weighted_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# What the model calls -------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, fused: bool | None = None) -> Tensor:
    """silu(gate) * up, [M, f] (arXiv 2002.05202). The kernel works in fp32 and rounds once; its backward pass starts from gate and up."""
    return _swiglu(gate, up) if is_fused(gate, fused) else F.silu(gate) * up


def weighted_swiglu(gate: Tensor, up: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """silu(gate) * up * w, w the weight of each row's choice; always the custom operator.

    Args:
        gate, up: [M, f]; rows from the last end on have no expert: they may be anything, here, in the result and in the gradients.
        weights: [N, k], those of choices without an expert get no gradient.
        order: int64 [M], the flat index of the choice in each row (`megascale.kernels.dispatch.sort_copies`).
        ends: int32 [E].
    """
    return _weighted(gate, up, weights, order, ends)
