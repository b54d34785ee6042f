"""Rows of tokens to the order of their experts, and back. N rows, k choices of each, M = N k copies, E experts, d width.

Both ways are sums over known places, never additions of many to one address: the same bits on every run. A choice may have no expert
(a capacity has dropped it): its copy stands behind those of all experts and its place is M, nowhere, which reads as zeros.

On CUDA devices the functions are Triton kernels, each row of a token read or written once; elsewhere, and with `fused=False`, plain
PyTorch, which torch.compile can trace and fuse. Both take rows of any width; widths that are not a multiple of 8 (bf16) are read in
narrow accesses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale.kernels.fused import is_fused
from megascale.kernels.precision import widen

# Sorting --------------------------------------------------------------------------------------------------------------


def sort_copies_reference(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_copies` in PyTorch."""
    experts = experts.contiguous()
    chosen, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device)).view(experts.shape)
    ends = torch.searchsorted(chosen, torch.arange(count, dtype=chosen.dtype, device=chosen.device), right=True)
    return order, torch.where(experts < count, place, order.numel()), ends.diff(prepend=ends.new_zeros(1))


@torch.library.custom_op("megascale::sort_copies", mutates_args=())
def _sort(experts: Tensor, count: int, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not (fused and experts.is_cuda):
        return sort_copies_reference(experts, count)
    from megascale.kernels.dispatch_triton import sort_copies

    return sort_copies(experts, count)


@_sort.register_fake
def _(experts, count, fused):
    number = experts.new_empty(experts.numel(), dtype=torch.int64)
    return number, experts.new_empty(experts.shape, dtype=torch.int64), experts.new_empty(count, dtype=torch.int64)


def sort_copies(experts: Tensor, count: int, fused: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The copies sorted by expert, those of one expert in the order of the tokens. Nothing waits for the device.

    It is an operator in plain PyTorch too: torch.compile may read what is scattered into before it is (torch 2.13, CPU; like its issue
    198270), and here it did so beside a router's counts.

    Args:
        experts: int64 [N, k], the expert of each choice; E: none.
        count: E.

    Returns: order [M], the flat index of the choice at each place; place [N, k], its inverse, M for choices without an expert; and the
    numbers [E] of the experts' copies. All int64.
    """
    order, place, counts = _sort(experts, count, is_fused(experts, fused))
    return order, place, counts


# Custom operators: copies and their sums, each the other's gradient ----------------------------------------------------------------


@torch.library.custom_op("megascale::write_copies", mutates_args=(), device_types="cpu")
def _write(x: Tensor, place: Tensor, rows: int) -> Tensor:
    out = x.new_zeros(rows + 1, x.shape[1])
    out[place.flatten()] = x.repeat_interleave(place.shape[1], 0)
    return out[:rows].clone()


@_write.register_kernel("cuda")
def _(x, place, rows):
    from megascale.kernels.dispatch_triton import write_copies

    return write_copies(x, place, rows)


@_write.register_fake
def _(x, place, rows):
    return x.new_empty(rows, x.shape[1])


def _with_zeros(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _pick(x: Tensor, place: Tensor) -> Tensor:
    """[N, k, d] in fp32 or wider, zeros for nowhere."""
    return _with_zeros(widen(x))[place]


@torch.library.custom_op("megascale::sum_copies", mutates_args=(), device_types="cpu")
def _sum(x: Tensor, place: Tensor) -> Tensor:
    return _pick(x, place).sum(1).to(x.dtype)


@_sum.register_kernel("cuda")
def _(x, place):
    from megascale.kernels.dispatch_triton import sum_copies

    return sum_copies(x, place)


@_sum.register_fake
def _(x, place):
    return x.new_empty(place.shape[0], x.shape[1])


@torch.library.custom_op("megascale::weighted_sum", mutates_args=(), device_types="cpu")
def _weighted_sum(x: Tensor, weights: Tensor, place: Tensor) -> Tensor:
    return (_pick(x, place) * weights[..., None]).sum(1).to(x.dtype)


@_weighted_sum.register_kernel("cuda")
def _(x, weights, place):
    from megascale.kernels.dispatch_triton import sum_copies

    return sum_copies(x, place, weights)


@_weighted_sum.register_fake
def _(x, weights, place):
    return x.new_empty(place.shape[0], x.shape[1])


@torch.library.custom_op("megascale::weighted_sum_backward", mutates_args=(), device_types="cpu")
def _weighted_sum_backward(grad: Tensor, x: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = x.new_zeros(x.shape[0] + 1, x.shape[1])
    grad_x[place] = (widen(grad)[:, None] * weights[..., None]).to(x.dtype)
    return grad_x[:-1].clone(), (_pick(x, place) * widen(grad)[:, None]).sum(-1).to(weights.dtype)


@_weighted_sum_backward.register_kernel("cuda")
def _(grad, x, weights, place):
    from megascale.kernels.dispatch_triton import weighted_sum_backward

    return weighted_sum_backward(grad, x, weights, place)


@_weighted_sum_backward.register_fake
def _(grad, x, weights, place):
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


@torch.library.custom_op("megascale::take_rows_or_zeros", mutates_args=(), device_types="cpu")
def _take_or_zeros(x: Tensor, index: Tensor, places: Tensor) -> Tensor:
    return _pick(x, index[:, None])[:, 0].to(x.dtype)


@_take_or_zeros.register_kernel("cuda")
def _(x, index, places):
    from megascale.kernels.dispatch_triton import sum_copies

    return sum_copies(x, index[:, None])


@_take_or_zeros.register_fake
def _(x, index, places):
    return x.new_empty(index.shape[0], x.shape[1])


def _keep_place(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


_write.register_autograd(lambda ctx, grad: (_sum(grad, ctx.saved_tensors[0]), None, None), setup_context=_keep_place)
_sum.register_autograd(lambda ctx, grad: (_write(grad, ctx.saved_tensors[0], ctx.rows), None), setup_context=_keep_place)
_weighted_sum.register_autograd(
    lambda ctx, grad: (*_weighted_sum_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_take_or_zeros.register_autograd(
    lambda ctx, grad: (_sum(grad, ctx.saved_tensors[0]), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2]),
)


# What the model calls -------------------------------------------------------------------------------------------------


class _TakeRows(torch.autograd.Function):
    """x[index], whose backward sums the known places of each row instead of scattering with atomics: same bits on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor, some_nowhere: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.some_nowhere = some_nowhere
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        if ctx.some_nowhere:
            grad = _with_zeros(grad)
        return (grad[places[:, 0]] if places.shape[1] == 1 else grad[places].sum(1)), None, None, None


def take_rows(x: Tensor, index: Tensor, places: Tensor, some_nowhere: bool = False, fused: bool | None = None) -> Tensor:
    """x[index], [M, d], where every row of x is taken to known places; what is in no place may be anything.

    Args:
        index: int64 [M].
        places: int64 [rows of x, c], where in `index` each row of x stands.
        some_nowhere: some places are M, nowhere.
    """
    if is_fused(x, fused):
        return _write(x, places, index.shape[0])
    return _TakeRows.apply(x, index, places, some_nowhere)


def take_rows_or_zeros(x: Tensor, index: Tensor, places: Tensor, fused: bool | None = None) -> Tensor:
    """x[index], [M, d], and zeros where the index is the number of rows of x; places as in `take_rows`, M for nowhere."""
    if is_fused(x, fused):
        return _take_or_zeros(x, index, places)
    nowhere = places.new_full((1, places.shape[1]), index.shape[0])
    return _TakeRows.apply(_with_zeros(x), index, torch.cat([places, nowhere]), True)


def copy_rows(rows: Tensor, order: Tensor, place: Tensor, some_dropped: bool = False, fused: bool | None = None) -> Tensor:
    """The copies [M, d] of rows [N, d], sorted by expert (`sort_copies`); what stands behind the last expert's may be anything."""
    if is_fused(rows, fused):
        return _write(rows, place, order.shape[0])
    return _TakeRows.apply(rows, order // place.shape[1], place, some_dropped)


def combine_copies(
    outputs: Tensor, gates: Tensor, order: Tensor, place: Tensor, some_dropped: bool = False, fused: bool | None = None
) -> Tensor:
    """The gated sum [N, d] over each token's copies of outputs [M, d]; gates [N, k]. Dropped copies count as zeros and are never read.

    The kernels sum in fp32 and round once; in PyTorch the gates and the products are rounded to the type of the outputs.
    """
    if is_fused(outputs, fused):
        return _weighted_sum(outputs, gates, place)
    if some_dropped:
        outputs, order = _with_zeros(outputs), torch.cat([order, order.new_zeros(1)])
    picked = _TakeRows.apply(outputs, place.flatten(), order[:, None], False).unflatten(0, place.shape)
    return (picked * gates[..., None].to(picked.dtype)).sum(1)


def sum_copies(outputs: Tensor, place: Tensor) -> Tensor:
    """The sum [N, d] over each token's copies of outputs [M, d], for outputs that are gated already; always the custom operator."""
    return _sum(outputs, place)
