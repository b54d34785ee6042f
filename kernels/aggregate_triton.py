"""Triton kernels of the stream aggregation; `aggregate.py` has the maths and the operators. T tokens, P streams of which P' are here,
d width, h hidden width.

Sums over the columns of a row, and over the rows of a column, are kept elementwise in registers, a tile for each stream, and joined once at
the end of a loop. A tile is 16 rows of 128 columns, 16 bytes for each of 256 threads in bf16: half a warp has a row, so that its sum needs
no barrier, and rows of `mix` and `bias`, having fewer columns than there are threads, are loaded in the tile's layout without an exchange
through shared memory. Loads of the next two tiles are under way while one is computed.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples that grow in loops, which Triton unrolls)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megascale.kernels.operands_triton import compute_type, dense_rows
from megascale.kernels.precision import wide_dtype

PARTS = 64
"""The rows are cut into at most so many parts for the sums over rows. With d = 2048 that is 1024 programs, and the partial sums are 2 % of
what is read and written."""


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _forward_kernel(
    x, hidden, bias, mix, mix_bias, y, weights, shares, tokens, width, inner, x_token, x_stream, hidden_token,
    SMOOTHING: tl.constexpr, STREAMS: tl.constexpr, FIRST: tl.constexpr, HERE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    rows, inside = row[:, None], real[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]

    sums = (tl.zeros([ROWS, COLUMNS], WIDE),) * STREAMS
    for start in tl.range(0, inner, COLUMNS, num_stages=STAGES):
        column = start + columns
        known = column < inner
        z = tl.load(hidden + rows * hidden_token + column, mask=inside & known, other=0).to(WIDE)
        z += tl.load(bias + column, mask=known, other=0).to(WIDE)
        active = z * _sigmoid(z)
        more = ()
        for p in tl.static_range(STREAMS):
            more = more + (sums[p] + active * tl.load(mix + p * inner + column, mask=known, other=0).to(WIDE),)
        sums = more

    scores = ()
    for p in tl.static_range(STREAMS):
        scores = scores + (tl.sum(sums[p], 1) + tl.load(mix_bias + p).to(WIDE),)
    largest = scores[0]
    for p in tl.static_range(1, STREAMS):
        largest = tl.maximum(largest, scores[p])
    total = tl.zeros([ROWS], WIDE)
    powers = ()
    for p in tl.static_range(STREAMS):
        powers = powers + (tl.exp(scores[p] - largest),)
        total += powers[p]
    mixed = ()
    for p in tl.static_range(STREAMS):
        share = powers[p] / total
        mixed = mixed + (share * (1 - SMOOTHING) + SMOOTHING / STREAMS,)
        tl.store(shares + row * STREAMS + p, share, mask=real)
        tl.store(weights + row * STREAMS + p, mixed[p], mask=real)

    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        column = start + columns
        there = inside & (column < width)
        result = tl.zeros([ROWS, COLUMNS], WIDE)
        for p in tl.static_range(HERE):
            stream = tl.load(x + rows * x_token + p * tl.cast(x_stream, tl.int64) + column, mask=there, other=0).to(WIDE)
            result += mixed[FIRST + p][:, None] * stream
        tl.store(y + rows * width + column, result, mask=there)


@triton.jit
def _backward_streams_kernel(
    grad_y, grad_weights, x, shares, grad_x, grad_scores, tokens, width, grad_token, x_token, x_stream,
    SMOOTHING: tl.constexpr, STREAMS: tl.constexpr, FIRST: tl.constexpr, HERE: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    rows, inside = row[:, None], real[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]

    share = ()
    for p in tl.static_range(STREAMS):
        share = share + (tl.load(shares + row * STREAMS + p, mask=real, other=0),)

    products = (tl.zeros([ROWS, COLUMNS], WIDE),) * HERE
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        column = start + columns
        there = inside & (column < width)
        g = tl.load(grad_y + rows * grad_token + column, mask=there, other=0).to(WIDE)
        more = ()
        for p in tl.static_range(HERE):
            stream = tl.load(x + rows * x_token + p * tl.cast(x_stream, tl.int64) + column, mask=there, other=0).to(WIDE)
            more = more + (products[p] + g * stream,)
        products = more
        for p in tl.static_range(HERE):  # behind all loads, which could not be moved over a store
            weight = share[FIRST + p] * (1 - SMOOTHING) + SMOOTHING / STREAMS
            tl.store(grad_x + (rows * HERE + p) * width + column, weight[:, None] * g, mask=there)

    grads = ()
    mean = tl.zeros([ROWS], WIDE)
    for p in tl.static_range(STREAMS):
        grad = tl.zeros([ROWS], WIDE)
        if GIVEN:
            grad += tl.load(grad_weights + row * STREAMS + p, mask=real, other=0).to(WIDE)
        if p >= FIRST and p < FIRST + HERE:
            grad += tl.sum(products[p - FIRST], 1)
        grads = grads + (grad,)
        mean += share[p] * grad
    for p in tl.static_range(STREAMS):
        tl.store(grad_scores + row * STREAMS + p, (1 - SMOOTHING) * share[p] * (grads[p] - mean), mask=real)


@triton.jit
def _backward_hidden_kernel(
    grad_scores, hidden, bias, mix, grad_hidden, partial, tokens, inner, hidden_token, rows_each,
    STREAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = columns[None, :]
    known = column < inner
    shift = tl.load(bias + column, mask=known, other=0).to(WIDE)

    sums = (tl.zeros([ROWS, COLUMNS], WIDE),) * STREAMS
    shift_sum = tl.zeros([ROWS, COLUMNS], WIDE)
    for start in tl.range(part * rows_each, tl.minimum((part + 1) * rows_each, tokens), ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        real = row < tokens
        there = real[:, None] & known
        z = tl.load(hidden + row[:, None] * hidden_token + column, mask=there, other=0).to(WIDE) + shift
        slope = _sigmoid(z)
        active = z * slope
        slope += active * (1 - slope)
        grad = tl.zeros([ROWS, COLUMNS], WIDE)
        more = ()
        for p in tl.static_range(STREAMS):
            score = tl.load(grad_scores + row * STREAMS + p, mask=real, other=0)[:, None]
            grad += score * tl.load(mix + p * inner + column, mask=known, other=0).to(WIDE)
            more = more + (sums[p] + score * active,)
        sums = more
        grad *= slope
        shift_sum += grad
        tl.store(grad_hidden + row[:, None] * inner + column, grad, mask=there)

    to = partial + part.to(tl.int64) * (STREAMS + 1) * inner + columns
    for p in tl.static_range(STREAMS):
        tl.store(to + p * inner, tl.sum(sums[p], 0), mask=columns < inner)
    tl.store(to + STREAMS * inner, tl.sum(shift_sum, 0), mask=columns < inner)


def _tile() -> dict[str, int]:
    """For any shape. AMD's warps have twice the threads, and its loads in advance would take registers, not shared memory."""
    warps, stages = (4, 1) if torch.version.hip else (8, 3)
    return {"ROWS": 16, "COLUMNS": 128, "STAGES": stages, "num_warps": warps}


def forward(
    x: Tensor, hidden: Tensor, bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float, first_stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, d] as x, and in fp32 or fp64 the weights [T, P] and the softmax they are smoothed from; see `aggregate.aggregate_streams`."""
    (tokens, here, width), (streams, inner) = x.shape, mix_weight.shape
    x, hidden = dense_rows(x), dense_rows(hidden)
    bias, mix_weight, mix_bias = bias.contiguous(), mix_weight.contiguous(), mix_bias.contiguous()
    y = x.new_empty(tokens, width)
    weights, shares = (x.new_empty(tokens, streams, dtype=wide_dtype(x)) for _ in range(2))
    tile = _tile()
    if tokens:
        _forward_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            x, hidden, bias, mix_weight, mix_bias, y, weights, shares, tokens, width, inner, x.stride(0), x.stride(1), hidden.stride(0),
            SMOOTHING=smoothing, STREAMS=streams, FIRST=first_stream, HERE=here, WIDE=compute_type(x), **tile,
        )  # fmt: skip
    return y, weights, shares


def backward_streams(
    grad_y: Tensor, grad_weights: Tensor | None, x: Tensor, shares: Tensor, smoothing: float, first_stream: int
) -> tuple[Tensor, Tensor]:
    """Of the gradients of y [T, d] and the weights [T, P]: the part of x's [T, P', d] that does not come through the scores, w_p grad_y,
    and the scores' [T, P] in fp32 or fp64.
    """
    (tokens, here, width), streams = x.shape, shares.shape[1]
    x, grad_y = dense_rows(x), dense_rows(grad_y)
    grad_x, grad_scores = x.new_empty(x.shape), torch.empty_like(shares)
    tile = _tile()
    if tokens:
        _backward_streams_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            grad_y, shares if grad_weights is None else grad_weights.contiguous(), x, shares, grad_x, grad_scores, tokens, width,
            grad_y.stride(0), x.stride(0), x.stride(1),
            SMOOTHING=smoothing, STREAMS=streams, FIRST=first_stream, HERE=here, GIVEN=grad_weights is not None,
            WIDE=compute_type(x), **tile,
        )  # fmt: skip
    return grad_x, grad_scores


def backward_hidden(grad_scores: Tensor, hidden: Tensor, bias: Tensor, mix_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the scores' gradient [T, P]: those of the hidden layer's result [T, h], its bias [h] and the mixing weight [P, h]."""
    (tokens, inner), streams = hidden.shape, mix_weight.shape[0]
    hidden, bias, mix_weight = dense_rows(hidden), bias.contiguous(), mix_weight.contiguous()
    grad_hidden = hidden.new_empty(tokens, inner)
    tile = _tile()
    rows_each = triton.cdiv(triton.cdiv(tokens, PARTS), tile["ROWS"]) * tile["ROWS"]
    parts = triton.cdiv(tokens, rows_each) if tokens else 0
    partial = grad_scores.new_empty(parts, streams + 1, inner)
    if tokens:
        _backward_hidden_kernel[(parts, triton.cdiv(inner, tile["COLUMNS"]))](
            grad_scores, hidden, bias, mix_weight, grad_hidden, partial, tokens, inner, hidden.stride(0), rows_each,
            STREAMS=streams, WIDE=compute_type(hidden), **tile,
        )  # fmt: skip
    sums = partial.sum(0)
    return grad_hidden, sums[-1].to(bias.dtype, copy=True), sums[:-1].to(mix_weight.dtype, copy=True)
