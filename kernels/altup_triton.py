"""The Triton kernels of `megascale.kernels.altup`, whose docstring has the formulas; forward and backward read and write everything once.

Rows are the R = T*P pairs of a token t and a stream p, row = t*P + p. A tile is a part of one row: LANES vectors of VECTOR elements, 16
bytes. A thread holds one vector of every block, so that a sum over a vector needs no other thread. All K blocks are loaded before the
first store, behind which a compiler would have to load them again.

The gradients of the coefficients are linear in the products M_ik = <dx'_i, x_k> and M_iK = <dx'_i, F>: those alone are summed over the
tiles, in K*(K+1) registers. With static coefficients each program sums its tiles and stores its part, and one more program adds the parts
in a fixed order. With token-dependent ones a program has one row, and is one warp: sums need no other warp.

X state, U update, C and E coefficients, Y output, G its gradient, GX ... those of the inputs; strides are in elements. WIDE is what sums
run in. EVEN: rows consist of whole tiles.
"""

# mypy: disable-error-code="assignment"
# tuples grow as loops over compile-time numbers unroll

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from megascale.kernels.operands_triton import compute_type, dense_rows
from megascale.kernels.precision import wide_dtype

WARPS = 4
PROGRAMS = 1024
"""of so many warps share the tiles of a backward pass with static coefficients: the same on every GPU, so that sums are too, and a few for
each multiprocessor (an H200 has 132)."""


@triton.jit
def _row(row, streams):
    """A row, its token and its stream as int64; divided before they are, since 64-bit division is a call."""
    return row.to(tl.int64), (row // streams).to(tl.int64), (row % streams).to(tl.int64)


@triton.jit
def _columns(tile, tiles, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[LANES, VECTOR], of a tile; its row has so many tiles."""
    return (tile % tiles) * (LANES * VECTOR) + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load(pointer, columns, width, WIDE: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:  # all columns are in the row: a mask would cost registers
        values = tl.load(pointer + columns)
    else:
        values = tl.load(pointer + columns, mask=columns < width, other=0.0)
    return values.to(WIDE)


@triton.jit
def _store(pointer, columns, width, values, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer + columns, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + columns, values.to(pointer.dtype.element_ty), mask=columns < width)


@triton.jit
def _load_blocks(pointer, block_stride, columns, width, WIDE: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(K):
        blocks = blocks + (_load(pointer, columns, width, WIDE, EVEN),)
        pointer += block_stride  # not k times the stride, which may pass 31 bits
    return blocks


@triton.jit
def _load_weighted(coefficients, step, blocks, WIDE: tl.constexpr, K: tl.constexpr):
    """sum_k c_k x_k; c_k are `step` apart."""
    total = tl.load(coefficients).to(WIDE) * blocks[0]
    for k in tl.static_range(1, K):
        total += tl.load(coefficients + k * step).to(WIDE) * blocks[k]
    return total


@triton.jit
def _mix_kernel(
    X, x_token, x_stream, x_block, U, u_token, u_stream, C, c_token, c_stream, E, e_token, e_stream, Y, streams, tiles, width,
    K: tl.constexpr, J: tl.constexpr, PREDICTED: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row, token, stream = _row(tile // tiles, streams)
    columns = _columns(tile, tiles, LANES, VECTOR)
    x = _load_blocks(X + token * x_token + stream * x_stream, x_block, columns, width, WIDE, EVEN, K)
    delta = _load(U + token * u_token + stream * u_stream, columns, width, WIDE, EVEN)
    c, e = C + token * c_token + stream * c_stream, E + token * e_token + stream * e_stream
    if not PREDICTED:
        delta -= _load_weighted(c + J * K, 1, x, WIDE, K)
    for i in tl.static_range(K):
        y = x[i] + _load_weighted(c + i * K, 1, x, WIDE, K) + (1 + tl.load(e + i).to(WIDE)) * delta
        _store(Y + (row * K + i) * width, columns, width, y, EVEN)


@triton.jit
def _store_gradients(products, C, E, GC, GE, K: tl.constexpr, J: tl.constexpr, PREDICTED: tl.constexpr, WIDE: tl.constexpr):
    """dc and de of the products M."""
    for i in tl.static_range(K):
        with_innovation = products[i * (K + 1) + K]
        for k in tl.static_range(K):
            grad = products[i * (K + 1) + k]
            if not PREDICTED:
                with_innovation -= tl.load(C + J * K + k).to(WIDE) * grad
                if i == J:
                    for m in tl.static_range(K):
                        grad -= (1 + tl.load(E + m).to(WIDE)) * products[m * (K + 1) + k]
            tl.store(GC + i * K + k, grad)
        tl.store(GE + i, with_innovation)


@triton.jit
def _mix_backward_kernel(
    G, g_token, g_stream, g_block, X, x_token, x_stream, x_block, U, u_token, u_stream, C, c_token, c_stream, E, e_token, e_stream,
    GX, GU, GC, GE, PARTS, streams, tiles, width, all_tiles, programs,
    K: tl.constexpr, J: tl.constexpr, PREDICTED: tl.constexpr, BY_TOKEN: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    products = ()
    for _ in tl.static_range(K * (K + 1)):
        products = products + (tl.zeros([LANES], WIDE),)
    if BY_TOKEN:
        first, last, step = program * tiles, program * tiles + tiles, 1
    else:
        first, last, step = program, all_tiles, programs
    for tile in range(first, last, step):
        row, token, stream = _row(tile // tiles, streams)
        columns = _columns(tile, tiles, LANES, VECTOR)
        g = _load_blocks(G + token * g_token + stream * g_stream, g_block, columns, width, WIDE, EVEN, K)
        x = _load_blocks(X + token * x_token + stream * x_stream, x_block, columns, width, WIDE, EVEN, K)
        update = _load(U + token * u_token + stream * u_stream, columns, width, WIDE, EVEN)
        c, e = C + token * c_token + stream * c_stream, E + token * e_token + stream * e_stream
        total = g[0] + _load_weighted(e, 1, g, WIDE, K)
        for k in tl.static_range(1, K):
            total += g[k]
        _store(GU + row * width, columns, width, total, EVEN)
        more = ()
        for i in tl.static_range(K):
            for k in tl.static_range(K):
                more = more + (products[i * (K + 1) + k] + tl.sum(g[i] * x[k], 1),)
            more = more + (products[i * (K + 1) + K] + tl.sum(g[i] * update, 1),)
        products = more
        for k in tl.static_range(K):
            grad = g[k] + _load_weighted(c + k, K, g, WIDE, K)
            if not PREDICTED:
                grad -= tl.load(c + J * K + k).to(WIDE) * total
            _store(GX + (row * K + k) * width, columns, width, grad, EVEN)
    sums = ()
    for m in tl.static_range(K * (K + 1)):
        sums = sums + (tl.sum(products[m], 0),)
    if BY_TOKEN:
        row, token, stream = _row(program, streams)
        c, e = C + token * c_token + stream * c_stream, E + token * e_token + stream * e_stream
        _store_gradients(sums, c, e, GC + row * (K * K), GE + row * K, K, J, PREDICTED, WIDE)
    else:
        for m in tl.static_range(K * (K + 1)):
            tl.store(PARTS + m * programs + program, sums[m])


@triton.jit
def _mix_coefficients_kernel(
    PARTS, C, E, GC, GE, programs,
    K: tl.constexpr, J: tl.constexpr, PREDICTED: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    part = tl.arange(0, LANES)
    sums = ()
    for m in tl.static_range(K * (K + 1)):
        sums = sums + (tl.sum(tl.load(PARTS + m * programs + part, mask=part < programs, other=0.0), 0),)
    _store_gradients(sums, C, E, GC, GE, K, J, PREDICTED, WIDE)


@triton.jit
def _predict_kernel(
    X, x_token, x_stream, x_block, C, c_token, c_stream, Y, streams, tiles, width,
    K: tl.constexpr, J: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row, token, stream = _row(tile // tiles, streams)
    columns = _columns(tile, tiles, LANES, VECTOR)
    x = _load_blocks(X + token * x_token + stream * x_stream, x_block, columns, width, WIDE, EVEN, K)
    y = x[J] + _load_weighted(C + token * c_token + stream * c_stream, 1, x, WIDE, K)
    _store(Y + row * width, columns, width, y, EVEN)


@triton.jit
def _predict_backward_kernel(
    G, g_token, g_stream, X, x_token, x_stream, x_block, C, c_token, c_stream, GX, PARTS, streams, tiles, width, all_tiles, programs,
    K: tl.constexpr, J: tl.constexpr, BY_TOKEN: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    products = ()
    for _ in tl.static_range(K):
        products = products + (tl.zeros([LANES], WIDE),)
    if BY_TOKEN:
        first, last, step = program * tiles, program * tiles + tiles, 1
    else:
        first, last, step = program, all_tiles, programs
    for tile in range(first, last, step):
        row, token, stream = _row(tile // tiles, streams)
        columns = _columns(tile, tiles, LANES, VECTOR)
        g = _load(G + token * g_token + stream * g_stream, columns, width, WIDE, EVEN)
        x = _load_blocks(X + token * x_token + stream * x_stream, x_block, columns, width, WIDE, EVEN, K)
        c = C + token * c_token + stream * c_stream
        more = ()
        for k in tl.static_range(K):
            more = more + (products[k] + tl.sum(g * x[k], 1),)
            weight = tl.load(c + k).to(WIDE)
            if k == J:
                weight += 1
            _store(GX + (row * K + k) * width, columns, width, weight * g, EVEN)
        products = more
    for k in tl.static_range(K):
        if BY_TOKEN:
            tl.store(PARTS + program.to(tl.int64) * K + k, tl.sum(products[k], 0))
        else:
            tl.store(PARTS + k * programs + program, tl.sum(products[k], 0))


@dataclass(frozen=True)
class _Tiles:
    """How rows are cut."""

    lanes: int
    vector: int
    warps: int
    by_row: int
    """tiles of a row"""
    everything: int
    """tiles of all rows"""
    even: bool

    @property
    def constants(self) -> dict[str, int]:
        return {"LANES": self.lanes, "VECTOR": self.vector, "EVEN": self.even, "num_warps": self.warps}

    @property
    def programs(self) -> int:
        """That share the tiles of a backward pass, see PROGRAMS."""
        return min(PROGRAMS * WARPS // self.warps, self.everything)


def _threads(x: Tensor) -> int:
    """Of a warp; any number will do in the interpreter, which takes tensors on a CPU."""
    return 32 if x.device.type == "cpu" else triton.runtime.driver.active.get_current_target().warp_size


def _cut(state: Tensor, rows: int, most_warps: int = WARPS, vector_bytes: int = 16) -> _Tiles:
    """As many warps as divide the row into whole tiles. Where none does, as many as it has work for; the last tile then has idle lanes."""
    vector, width = vector_bytes // state.element_size(), state.shape[3]
    one = _threads(state) * vector
    even = [warps for warps in (4, 2, 1) if warps <= most_warps and width % (warps * one) == 0]
    warps = even[0] if even else min(most_warps, triton.next_power_of_2(-(-width // one)))
    by_row = -(-width // (warps * one))
    return _Tiles(warps * one // vector, vector, warps, by_row, rows * by_row, bool(even))


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x [T, P, ..., d] with neighbours in the last dimension, and its strides of a token and of a stream; 0 where all streams share it."""
    x = dense_rows(x)
    return x, x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)


def _coefficients(c: Tensor, dims: int) -> tuple[Tensor, int, int]:
    """As `_rows`, of coefficients whose last `dims` dimensions are dense; static ones are the same for all tokens."""
    if c.ndim == dims:
        return c.contiguous(), 0, 0
    dense = c.stride(-1) == 1 and (dims == 1 or c.stride(-2) == c.shape[-1])
    return _rows(c if dense else c.contiguous())


def mix(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool) -> Tensor:
    """`altup_mix` without gradients."""
    (tokens, streams, width), blocks = update.shape, state.shape[2]
    out = state.new_empty(tokens, streams, blocks, width)
    if not out.numel():
        return out
    tiles, (state, *state_strides) = _cut(state, tokens * streams), _rows(state)
    _mix_kernel[(tiles.everything,)](
        state, *state_strides, state.stride(2), *_rows(update), *_coefficients(predict, 2), *_coefficients(correct, 1),
        out, streams, tiles.by_row, width,
        K=blocks, J=computed, PREDICTED=predicted, WIDE=compute_type(predict), **tiles.constants,
    )  # fmt: skip
    return out


def mix_backward(
    grad: Tensor, state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `altup_mix`: of state, update, predict, correct."""
    (tokens, streams, width), blocks, by_token = update.shape, state.shape[2], predict.ndim > 2
    rows, dtype = tokens * streams, wide_dtype(predict)
    grad_state, grad_update = state.new_empty(tokens, streams, blocks, width), update.new_empty(update.shape)
    outer = (tokens, streams) if by_token else ()
    grad_predict, grad_correct = (predict.new_empty(*outer, *size, dtype=dtype) for size in ((blocks, blocks), (blocks,)))
    if not grad_update.numel():
        return tuple(x.new_zeros(x.shape) for x in (state, update, predict, correct))  # type: ignore[return-value]
    tiles = _cut(state, rows, 1 if by_token else WARPS, 16 if blocks <= 4 else 8)
    programs = rows if by_token else tiles.programs
    parts = predict.new_empty(0 if by_token else blocks * (blocks + 1) * programs, dtype=dtype)
    (grad, *grad_strides), (state_rows, *state_strides) = _rows(grad), _rows(state)
    c, e = _coefficients(predict, 2), _coefficients(correct, 1)
    constants = {"K": blocks, "J": computed, "PREDICTED": predicted, "WIDE": compute_type(predict)}
    _mix_backward_kernel[(programs,)](
        grad, *grad_strides, grad.stride(2), state_rows, *state_strides, state_rows.stride(2), *_rows(update), *c, *e,
        grad_state, grad_update, grad_predict, grad_correct, parts, streams, tiles.by_row, width, tiles.everything, programs,
        BY_TOKEN=by_token, **constants, **tiles.constants,
    )  # fmt: skip
    if not by_token:
        _mix_coefficients_kernel[(1,)](
            parts, c[0], e[0], grad_predict, grad_correct, programs, LANES=triton.next_power_of_2(programs), **constants
        )
    grad_predict, grad_correct = (
        g.sum_to_size(x.shape).to(x.dtype) for g, x in ((grad_predict, predict), (grad_correct, correct))
    )
    return grad_state.sum_to_size(state.shape), grad_update, grad_predict, grad_correct


def predict(state: Tensor, row: Tensor, computed: int) -> Tensor:
    """`altup_predict` without gradients."""
    tokens, streams, blocks, width = state.shape
    out = state.new_empty(tokens, streams, width)
    if not out.numel():
        return out
    tiles, (state, *strides) = _cut(state, tokens * streams), _rows(state)
    _predict_kernel[(tiles.everything,)](
        state, *strides, state.stride(2), *_coefficients(row, 1), out, streams, tiles.by_row, width,
        K=blocks, J=computed, WIDE=compute_type(row), **tiles.constants,
    )  # fmt: skip
    return out


def predict_backward(grad: Tensor, state: Tensor, row: Tensor, computed: int) -> tuple[Tensor, Tensor]:
    """The gradients of `altup_predict`: of state and row."""
    (tokens, streams, blocks, width), by_token = state.shape, row.ndim > 1
    rows = tokens * streams
    grad_state = state.new_empty(state.shape)
    if not grad_state.numel():
        return grad_state, row.new_zeros(row.shape)
    tiles = _cut(state, rows, 1 if by_token else WARPS)
    programs = rows if by_token else tiles.programs
    parts = row.new_empty((tokens, streams, blocks) if by_token else (blocks, programs), dtype=wide_dtype(row))
    state, *strides = _rows(state)
    _predict_backward_kernel[(programs,)](
        *_rows(grad), state, *strides, state.stride(2), *_coefficients(row, 1), grad_state, parts,
        streams, tiles.by_row, width, tiles.everything, programs,
        K=blocks, J=computed, BY_TOKEN=by_token, WIDE=compute_type(row), **tiles.constants,
    )  # fmt: skip
    return grad_state, (parts if by_token else parts.sum(1)).to(row.dtype)
