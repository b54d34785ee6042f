"""The expert GEMM: rows sorted by expert, each multiplied by its own expert's weight. M rows, E experts, i inputs, o outputs.

torch's grouped GEMM behind one custom op: its fake kernel accepts only bf16 (torch 2.13), which would break graphs in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_grouped_mm: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm  # torch 2.11 has only the private name


def _edges(ends: Tensor) -> list[tuple[int, int]]:
    edges = [0, *ends.tolist()]
    return list(zip(edges, edges[1:], strict=False))


ROWS = 128
"""On a CPU in bf16 each expert's GEMM has a multiple of this many rows: oneDNN compiles a GEMM anew for each number of rows it meets."""


def _by_multiples(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _multiple(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _multiply_multiples(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, i] times each expert's weight [E, i, o]. Nothing is padded: an expert's GEMM goes on into the next one's rows, whose results
    are written after its own.
    """
    rows, result = x.shape[0], x.new_empty(x.shape[0], weight.shape[2])
    for e, (start, stop) in enumerate(_edges(ends)):
        size = _multiple(stop - start)
        if start == stop:
            continue
        if start + size <= rows:
            torch.mm(x[start : start + size], weight[e], out=result[start : start + size])
        elif size <= rows:  # it ends with the last row instead
            result[start:stop] = torch.mm(x[rows - size :], weight[e])[start - rows + size : stop - rows + size]
        else:
            torch.mm(x[start:stop], weight[e], out=result[start:stop])
    return result


def _sum_multiples(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Each expert's grad^T x, [E, o, i]. The rows of others that its GEMM goes on into meet zeros, in a copy of the narrower operand."""
    result = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    edges = _edges(ends)
    for e, (start, stop) in enumerate(edges):
        size = _multiple(stop - start)
        if start == stop:
            result[e].zero_()
            continue
        first = min(start, edges[-1][1] - size)  # rows from the last end on may hold anything
        if first < 0:
            torch.mm(grad[start:stop].t(), x[start:stop], out=result[e])
            continue
        left, right = grad[first : first + size], x[first : first + size]
        if right.shape[1] <= left.shape[1]:
            right = _only(right, start - first, stop - first)
        else:
            left = _only(left, start - first, stop - first)
        torch.mm(left.t(), right, out=result[e])
    return result


def _only(x: Tensor, start: int, stop: int) -> Tensor:
    """These rows of x, and zeros in place of the others."""
    if stop - start == x.shape[0]:
        return x
    result = x.clone()
    result[:start].zero_()
    result[stop:].zero_()
    return result


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, i] times each expert's weight [E, i, o]."""
    return _multiply_multiples(x, weight, ends) if _by_multiples(x) else _grouped_mm(x, weight, offs=ends)


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear` as a loop over experts; zeros in rows from the last end on."""
    edges = _edges(ends)
    behind = x.new_zeros(x.shape[0] - edges[-1][1], weight.shape[1])
    return torch.cat([*(F.linear(x[start:stop], weight[e]) for e, (start, stop) in enumerate(edges)), behind])


@torch.library.custom_op("megascale::grouped_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # torch's grouped kernels have no fp64
        return grouped_linear_reference(x, weight, ends)
    return _grouped(x, weight.transpose(-1, -2), ends)


@_forward.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("megascale::grouped_linear_dgrad", mutates_args=())
def grouped_linear_dgrad(grad: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The gradient [M, i] of x, of the output's gradient [M, o]."""
    if grad.dtype == torch.float64:
        return grouped_linear_reference(grad, weight.transpose(-1, -2), ends)
    return _grouped(grad, weight, ends)


@grouped_linear_dgrad.register_fake
def _(grad, weight, ends):
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.custom_op("megascale::grouped_linear_wgrad", mutates_args=())
def grouped_linear_wgrad(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient [E, o, i] of the weight, of the output's gradient [M, o]."""
    if x.dtype == torch.float64:
        return torch.stack([grad[start:stop].t() @ x[start:stop] for start, stop in _edges(ends)])
    if _by_multiples(x):
        return _sum_multiples(grad, x, ends)
    return _grouped_mm(grad.t(), x, offs=ends)


@grouped_linear_wgrad.register_fake
def _(grad, x, ends):
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)  # strides of nothing may be 0, which products refuse
    grad_x = grouped_linear_dgrad(grad, weight, ends) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_linear_wgrad(grad, x, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_forward.register_autograd(_backward, setup_context=_setup)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y[m] = weight[e] x[m] for the rows m of expert e.

    Args:
        x: [M, i], rows sorted by expert; rows from the last end on are not read, and may be anything in the result and in the gradient.
        weight: [E, o, i], same dtype.
        ends: int32 [E], the row after the last one of each expert.

    Returns: [M, o].
    """
    return _forward(x.contiguous(), weight, ends)
