"""Triton kernels of `megascale.kernels.dispatch`: a counting sort of choices by expert, and rows that are copied to and summed from places.

N rows of tokens, k choices of each, M = N k copies, E experts, d width. Nothing here adds atomically to global memory: every sum has one
program that forms it, in a fixed order, so that repetition gives the same bits (a block's histogram adds whole numbers in shared memory,
in which no order shows). Offsets of rows are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megascale.kernels.operands_triton import compute_type, dense_rows

# Sorting --------------------------------------------------------------------------------------------------------------
# As a radix sort's one pass over digits (Satish, Harris, Garland 2009, section 4): each block counts its experts, a scan over the blocks
# says how many copies of an expert come before each, and every block then places its own copies.


@triton.jit
def _count_block(experts, table, copies, blocks, count, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """table[e, block] = copies of expert e in the block; the positions behind the last copy fall into bin E + 1."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + at, mask=at < copies, other=count + 1).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(table + bins.to(tl.int64) * blocks + block, tl.histogram(expert, BINS))


@triton.jit
def _scan_blocks(table, totals, blocks, CHUNK: tl.constexpr):
    """table[e, block] = copies of expert e in the blocks before; totals[e] = in all."""
    bin = tl.program_id(0).to(tl.int64)
    total = 0
    for start in range(0, blocks, CHUNK):
        at = start + tl.arange(0, CHUNK)
        number = tl.load(table + bin * blocks + at, mask=at < blocks, other=0)
        tl.store(table + bin * blocks + at, total + tl.cumsum(number, 0) - number, mask=at < blocks)
        total += tl.sum(number, 0)
    tl.store(totals + bin, total)


@triton.jit
def _place_block(
    experts, table, totals, order, place, counts, copies, blocks, count,
    BLOCK: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < copies
    expert = tl.load(experts + at, mask=inside, other=count + 1).to(tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)  # equal ones before it in the block, counted by comparing each with each
    for start in range(0, BLOCK, STEP):
        other_at = first + start + tl.arange(0, STEP)
        other = tl.load(experts + other_at, mask=other_at < copies, other=count + 1).to(tl.int32)
        before = (other[None, :] == expert[:, None]) & (other_at[None, :] < at[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins, mask=bins <= count, other=0)
    starts = tl.cumsum(total, 0) - total
    earlier = tl.load(table + expert.to(tl.int64) * blocks + block, mask=inside, other=0)
    to = (tl.gather(starts, expert, 0) + earlier + rank).to(tl.int64)
    tl.store(order + to, at, mask=inside)
    tl.store(place + at, tl.where(expert < count, to, copies), mask=inside)
    if block == 0:
        tl.store(counts + bins, total.to(tl.int64), mask=bins < count)


def sort_copies(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `megascale.kernels.dispatch.sort_copies`."""
    experts, copies = experts.contiguous(), experts.numel()
    order = experts.new_empty(copies, dtype=torch.int64)
    place = experts.new_empty(experts.shape, dtype=torch.int64)
    if copies == 0:
        return order, place, experts.new_zeros(count, dtype=torch.int64)
    counts = experts.new_empty(count, dtype=torch.int64)
    bins = max(triton.next_power_of_2(count + 2), 16)
    # comparing costs BLOCK operations a copy, the table bins / BLOCK numbers
    block = 128 if bins <= 512 else 512
    blocks = triton.cdiv(copies, block)
    table = experts.new_empty(bins, blocks, dtype=torch.int32)
    totals = experts.new_empty(count + 1, dtype=torch.int32)
    _count_block[(blocks,)](experts, table, copies, blocks, count, BLOCK=block, BINS=bins, num_warps=block // 32)
    _scan_blocks[(count + 1,)](table, totals, blocks, CHUNK=min(max(triton.next_power_of_2(blocks), 32), 1024), num_warps=4)
    _place_block[(blocks,)](
        experts,
        table,
        totals,
        order,
        place,
        counts,
        copies,
        blocks,
        count,
        BLOCK=block,
        BINS=bins,
        STEP=32,
        num_warps=block // 32,
    )
    return order, place, counts


# Rows -----------------------------------------------------------------------------------------------------------------
# A program has one row of a token: place says where its k copies stand, `rows` or more for nowhere.


@triton.jit
def _write_copies(x, place, out, x_stride, width, rows, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[place[n, c]] = x[n]: every row is read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside)
    for c in tl.static_range(K):
        to = tl.load(place + row * K + c)
        tl.store(out + to * width + column, value, mask=inside & (to < rows))


@triton.jit
def _sum_copies(
    x, weights, place, out, x_stride, width, rows,
    K: tl.constexpr, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over c of weights[n, c] x[place[n, c]], rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], COMPUTE)
    for c in tl.static_range(K):
        at = tl.load(place + row * K + c)
        value = tl.load(x + at * x_stride + column, mask=inside & (at < rows), other=0).to(COMPUTE)
        if WEIGHTED:
            value *= tl.load(weights + row * K + c).to(COMPUTE)
        total = value if c == 0 else total + value  # 0 + x would lose the sign of -0
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum_backward(
    grad, x, weights, place, grad_x, grad_weights, grad_stride, x_stride, width, rows,
    K: tl.constexpr, CHOICES: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x[place[n, c]] = weights[n, c] grad[n] and grad_weights[n, c] = <grad[n], x[place[n, c]]>. Every row is read once."""
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    at = tl.load(place + row * K + choice, mask=choice < K, other=rows)
    weight = tl.load(weights + row * K + choice, mask=choice < K, other=0).to(COMPUTE)
    dots = tl.zeros([CHOICES, BLOCK], COMPUTE)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        there = (at < rows)[:, None] & inside[None, :]
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0).to(COMPUTE)
        value = tl.load(x + (at * x_stride)[:, None] + column[None, :], mask=there, other=0).to(COMPUTE)
        dots += value * g[None, :]
        scaled = (weight[:, None] * g[None, :]).to(grad_x.dtype.element_ty)
        tl.store(grad_x + (at * width)[:, None] + column[None, :], scaled, mask=there)
    tl.store(grad_weights + row * K + choice, tl.sum(dots, 1).to(grad_weights.dtype.element_ty), mask=choice < K)


def _tile(width: int, number: int = 1) -> tuple[int, int]:
    """Columns of a tile of `number` rows, and warps for it: 16 elements a thread, two accesses of 128 bits in bf16, and up to 32 in the
    largest tile, 8192 elements on 8 warps."""
    block = min(triton.next_power_of_2(width), max(8192 // number, 16))
    return block, min(max(number * block // 512, 1), 8)


def write_copies(x: Tensor, place: Tensor, rows: int) -> Tensor:
    """[rows, d]: x [N, d] at the places [N, k] of its copies; rows that are no place are not written."""
    x, out = dense_rows(x), x.new_empty(rows, x.shape[1])
    if x.numel() == 0 or rows == 0:
        return out
    block, warps = _tile(x.shape[1])
    grid = (x.shape[0], triton.cdiv(x.shape[1], block))
    place = place.contiguous()
    _write_copies[grid](x, place, out, x.stride(0), x.shape[1], rows, K=place.shape[1], BLOCK=block, num_warps=warps)
    return out


def sum_copies(x: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """[N, d]: sums of x [M, d] over the places [N, k], times the weights [N, k]; a place of M or more counts as zeros."""
    x, place, out = dense_rows(x), place.contiguous(), x.new_empty(place.shape[0], x.shape[1])
    if out.numel() == 0:
        return out
    weights = None if weights is None else weights.contiguous()
    block, warps = _tile(x.shape[1])
    _sum_copies[(place.shape[0], triton.cdiv(x.shape[1], block))](
        x, weights, place, out, x.stride(0), x.shape[1], x.shape[0],
        K=place.shape[1], WEIGHTED=weights is not None, COMPUTE=compute_type(x), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def weighted_sum_backward(grad: Tensor, x: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x [M, d] (rows that are no place are not written) and of the weights [N, k], of the gradient [N, d] of
    `sum_copies`.
    """
    grad, x, weights, place = dense_rows(grad), dense_rows(x), weights.contiguous(), place.contiguous()
    grad_x, grad_weights = x.new_empty(x.shape), weights.new_empty(weights.shape)
    if place.numel() == 0:
        return grad_x, grad_weights
    if x.shape[1] == 0:
        return grad_x, grad_weights.zero_()
    k = place.shape[1]
    choices = triton.next_power_of_2(k)
    block, warps = _tile(x.shape[1], choices)
    _weighted_sum_backward[(place.shape[0],)](
        grad, x, weights, place, grad_x, grad_weights, grad.stride(0), x.stride(0), x.shape[1], x.shape[0],
        K=k, CHOICES=choices, COMPUTE=compute_type(x), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return grad_x, grad_weights
