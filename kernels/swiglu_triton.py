"""Triton kernels of `megascale.kernels.swiglu`. M rows, f width.

A program has one row, since a row's sum is the gradient of its weight; rows from `ends[-1]` on are left alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megascale.kernels.operands_triton import compute_type, dense_rows


@triton.jit
def _forward(
    gate, up, weights, order, ends, out, gate_stride, up_stride, width, experts,
    WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if WEIGHTED:
        inside = inside & (row < tl.load(ends + experts - 1))
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(COMPUTE)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(COMPUTE)
    value = g * tl.sigmoid(g) * u
    if WEIGHTED:
        value *= tl.load(weights + tl.load(order + row)).to(COMPUTE)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, gate, up, weights, order, ends, grad_gate, grad_up, grad_weights, grad_stride, gate_stride, up_stride, width, experts,
    WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    live = row >= 0
    if WEIGHTED:
        live = row < tl.load(ends + experts - 1)
        choice = tl.load(order + row)
        weight = tl.load(weights + choice).to(COMPUTE)
        dots = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < width) & live
        d = tl.load(grad + row * grad_stride + column, mask=inside, other=0).to(COMPUTE)
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(COMPUTE)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(COMPUTE)
        s = tl.sigmoid(g)
        if WEIGHTED:
            dots += d * (g * s * u)
            d *= weight
        of_gate = d * u * s * (1 + g * (1 - s))
        of_up = d * g * s
        tl.store(grad_gate + row * width + column, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + row * width + column, of_up.to(grad_up.dtype.element_ty), mask=inside)
    if WEIGHTED:  # rows behind the last expert's were read as zeros: their weights get zero
        tl.store(grad_weights + choice, tl.sum(dots, 0).to(grad_weights.dtype.element_ty))


def _tile(width: int) -> tuple[int, int]:
    """Columns at a time, and warps for them: 16 elements a thread, two accesses of 128 bits in bf16; fine-grained experts are narrow, and a
    row of theirs is one tile."""
    block = min(triton.next_power_of_2(width), 4096)
    return block, min(max(block // 512, 1), 8)


def swiglu(
    gate: Tensor, up: Tensor, weights: Tensor | None = None, order: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    """See `megascale.kernels.swiglu`; with weights, rows from `ends[-1]` on are not written."""
    gate, up, out = dense_rows(gate), dense_rows(up), gate.new_empty(gate.shape)
    weights, order, ends = (None if x is None else x.contiguous() for x in (weights, order, ends))
    if out.numel() == 0:
        return out
    block, warps = _tile(gate.shape[1])
    _forward[(gate.shape[0], triton.cdiv(gate.shape[1], block))](
        gate, up, weights, order, ends, out,
        gate.stride(0), up.stride(0), gate.shape[1], 0 if ends is None else ends.numel(),
        WEIGHTED=weights is not None, COMPUTE=compute_type(gate), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None = None, order: Tensor | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up (with weights, rows from `ends[-1]` on are not written), and of the weights, of that of the result."""
    grad, gate, up = dense_rows(grad), dense_rows(gate), dense_rows(up)
    weights, order, ends = (None if x is None else x.contiguous() for x in (weights, order, ends))
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    grad_weights = None if weights is None else weights.new_empty(weights.shape)
    if gate.numel() == 0:
        return grad_gate, grad_up, None if grad_weights is None else grad_weights.zero_()
    block, warps = _tile(gate.shape[1])
    _backward[(gate.shape[0],)](
        grad, gate, up, weights, order, ends, grad_gate, grad_up, grad_weights,
        grad.stride(0), gate.stride(0), up.stride(0), gate.shape[1], 0 if ends is None else ends.numel(),
        WEIGHTED=weights is not None, COMPUTE=compute_type(gate), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return grad_gate, grad_up, grad_weights
