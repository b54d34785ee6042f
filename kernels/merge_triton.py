"""The Triton kernel that merges two parts of attention; `merge.py` has the maths. A row is one head of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megascale.kernels.operands_triton import compute_type, dense_rows

ELEMENTS = 4096
"""Of a program, 16 for each of 256 threads: with two parts of 32 bytes, enough loads are under way."""


@triton.jit
def _merge_kernel(
    out1, lse1, out2, lse2, out, lse, rows, width,
    lse1_token, lse1_head, out2_stream, out2_head, out2_token, lse2_stream, lse2_head, lse2_token,
    HEADS: tl.constexpr, HEADS1: tl.constexpr, HEADS2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    token, head = row // HEADS, row % HEADS
    head1, stream, head2 = head % HEADS1, head // HEADS2, head % HEADS2
    column = tl.arange(0, COLUMNS)[None, :]
    there = real[:, None] & (column < width)

    first = tl.load(lse1 + token * lse1_token + head1 * lse1_head, mask=real, other=0).to(WIDE)
    second = tl.load(lse2 + stream * lse2_stream + head2 * lse2_head + token * lse2_token, mask=real, other=0).to(WIDE)
    largest = tl.maximum(first, second)
    one, two = tl.exp(first - largest), tl.exp(second - largest)
    total = one + two
    tl.store(lse + row, largest + tl.log(total), mask=real)

    part1 = tl.load(out1 + (token * HEADS1 + head1)[:, None] * width + column, mask=there, other=0).to(WIDE)
    place = stream * out2_stream + head2 * out2_head + token * out2_token
    part2 = tl.load(out2 + place[:, None] + column, mask=there, other=0).to(WIDE)
    tl.store(out + row[:, None] * width + column, part1 * (one / total)[:, None] + part2 * (two / total)[:, None], mask=there)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """See `merge.merge_streams_by_lse`."""
    streams, heads, tokens, width = more.shape
    more = dense_rows(more)
    merged = out if out.shape[1] == streams * heads else out.new_empty(tokens, streams * heads, width)
    # of its own: a row's log-sum-exp is read by all threads that have a part of the row
    merged_lse = lse.new_empty(tokens, streams * heads)
    columns = max(16, triton.next_power_of_2(width))
    tile = max(1, ELEMENTS // columns)
    if tokens:
        _merge_kernel[(triton.cdiv(tokens * streams * heads, tile),)](
            out, lse, more, more_lse, merged, merged_lse, tokens * streams * heads, width,
            *lse.stride(), *more.stride()[:3], *more_lse.stride(),
            HEADS=streams * heads, HEADS1=out.shape[1], HEADS2=heads, ROWS=tile, COLUMNS=columns,
            WIDE=compute_type(lse), num_warps=4 if torch.version.hip else 8,
        )  # fmt: skip
    return merged, merged_lse
