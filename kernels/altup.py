"""AltUp's passes over the state of K blocks (arXiv 2301.13310, Algorithm 1); on a GPU each is one kernel.

T tokens, P streams, K blocks x_k, d width; the state x is [T, P, K, d], j is the block that a layer computes on.

    predict   xh_i = x_i + sum_k c_ik x_k                                          `altup_predict`: xh_j alone
    correct   x'_i = xh_i + (1 + e_i) (F + r - xh_j)                               `altup_mix`: predict and correct of all blocks

F is the layer's update, r what it read: x_j, so that r - xh_j = -sum_k c_jk x_k; or, `predicted`, xh_j, where the difference vanishes.
Coefficients are static, c [K, K] and e [K], or each token's own, c [T, P, K, K] and e [T, P, K]. Sums run in the precision of the
coefficients and are rounded once, to that of the state. The state may have one stream, [T, 1, K, d], where the update has P.

Backward, with S = sum_k (1 + e_k) dx'_k: dF = S; dxh_i = dx'_i, less S for i = j where x_j was read; dx_k = dx'_k + sum_i c_ik dxh_i;
dc_ik = <dxh_i, x_k>; de_i = <dx'_i, F + r - xh_j>. Nothing but the inputs is saved.

In units of T*P*d elements the mix cannot move less than 2K + 1 forward (K blocks and F in, K out) and 3K + 2 backward (dx', x, F in, dx, dF
out), and the kernels move that. Inductor (torch 2.13, counted by its scheduler) makes 2K + 1 forward and 8, 22, 90 backward of the plain
form for K = 2, 4, 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale.kernels.fused import is_fused

Blocks = tuple[Tensor, ...]
"""K tensors [T, P, d], views of one state."""

MOST_BLOCKS = 8
"""of the kernels, which hold one vector of every block in registers"""


def why_plain(blocks: int, width: int) -> str:
    """Why the kernels are not made for K blocks of width d, in words; empty: they are."""
    if blocks > MOST_BLOCKS:
        return f"more than {MOST_BLOCKS} blocks"
    return "" if width % 16 == 0 else "a width that is no multiple of 16"  # rows consist of whole vectors of 16 bytes


def _fits(state: Tensor) -> bool:
    return not why_plain(state.shape[2], state.shape[3])


# the plain forms: one block and one product at a time, so that nothing K times as wide is held in the precision of the coefficients


def _weighted(coefficients: Tensor, blocks: Blocks) -> Tensor:
    """sum_k c_k x_k in the precision of the coefficients [K] or [T, P, K]."""
    total = coefficients[..., 0, None] * blocks[0].to(coefficients.dtype)
    for k in range(1, len(blocks)):
        total = total + coefficients[..., k, None] * blocks[k].to(coefficients.dtype)
    return total


def _along(product: Tensor, coefficient: Tensor) -> Tensor:
    """The gradient of a coefficient (0-dimensional, or [T, P]) that multiplied something [T, P, d]: products summed over the rest."""
    return product.sum() if coefficient.ndim == 0 else product.sum(-1).sum_to_size(coefficient.shape)


def _innovation(update: Tensor, predict: Tensor, computed: int, predicted: bool, blocks: Blocks) -> Tensor:
    """F + r - xh_j."""
    wide = update.to(predict.dtype)
    return wide if predicted else wide - _weighted(predict[..., computed, :], blocks)


def _mix(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool) -> Tensor:
    blocks = state.unbind(2)
    delta = _innovation(update, predict, computed, predicted, blocks)
    new = [
        (x + _weighted(predict[..., i, :], blocks) + (1 + correct[..., i, None]) * delta).to(x.dtype)
        for i, x in enumerate(blocks)
    ]
    return torch.stack(new, 2)


def _mix_backward(
    grad: Tensor, state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of state, update, predict, correct."""
    blocks = state.unbind(2)
    delta = _innovation(update, predict, computed, predicted, blocks)
    grads = tuple(g.to(predict.dtype) for g in grad.unbind(2))
    grad_correct = torch.stack([_along(g * delta, correct[..., i]) for i, g in enumerate(grads)], -1)
    total = _weighted(1 + correct, grads)
    mixed = tuple(g if predicted or i != computed else g - total for i, g in enumerate(grads))
    rows = [torch.stack([_along(g * x, predict[..., i, k]) for k, x in enumerate(blocks)], -1) for i, g in enumerate(mixed)]
    grad_blocks = [(grads[k] + _weighted(predict[..., :, k], mixed)).to(state.dtype) for k in range(len(blocks))]
    return torch.stack(grad_blocks, 2).sum_to_size(state.shape), total.to(update.dtype), torch.stack(rows, -2), grad_correct


def _predict(state: Tensor, row: Tensor, computed: int) -> Tensor:
    return (state.select(2, computed) + _weighted(row, state.unbind(2))).to(state.dtype)


def _predict_backward(grad: Tensor, state: Tensor, row: Tensor, computed: int) -> tuple[Tensor, Tensor]:
    """Gradients of state and row."""
    blocks, wide = state.unbind(2), grad.to(row.dtype)
    grad_row = torch.stack([_along(wide * x, row[..., k]) for k, x in enumerate(blocks)], -1)
    grads = [((row[..., k, None] + (k == computed)) * wide).to(state.dtype) for k in range(len(blocks))]
    return torch.stack(grads, 2), grad_row


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool
    ) -> Tensor:
        ctx.save_for_backward(state, update, predict, correct)
        ctx.computed, ctx.predicted = computed, predicted
        return _mix(state, update, predict, correct, computed, predicted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, update, predict, correct = ctx.saved_tensors
        return *_mix_backward(grad, state, update, predict, correct, ctx.computed, ctx.predicted), None, None


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, row: Tensor, computed: int) -> Tensor:
        ctx.save_for_backward(state, row)
        ctx.computed = computed
        return _predict(state, row, computed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, row = ctx.saved_tensors
        return *_predict_backward(grad, state, row, ctx.computed), None


# the fused forms


@torch.library.custom_op("megascale::altup_mix", mutates_args=(), device_types="cpu")
def _fused_mix(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool) -> Tensor:
    return _mix(state, update, predict, correct, computed, predicted)


@_fused_mix.register_kernel("cuda")
def _(state, update, predict, correct, computed, predicted):
    from megascale.kernels import altup_triton

    return altup_triton.mix(state, update, predict, correct, computed, predicted)


@_fused_mix.register_fake
def _(state, update, predict, correct, computed, predicted):
    return state.new_empty(*update.shape[:2], *state.shape[2:])


@torch.library.custom_op("megascale::altup_mix_backward", mutates_args=(), device_types="cpu")
def _fused_mix_backward(
    grad: Tensor, state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_state, *others = _mix_backward(grad, state, update, predict, correct, computed, predicted)
    grad_update, grad_predict, grad_correct = (x.contiguous() for x in others)
    return grad_state.contiguous(), grad_update, grad_predict, grad_correct


@_fused_mix_backward.register_kernel("cuda")
def _(grad, state, update, predict, correct, computed, predicted):
    from megascale.kernels import altup_triton

    return altup_triton.mix_backward(grad, state, update, predict, correct, computed, predicted)


@_fused_mix_backward.register_fake
def _(grad, state, update, predict, correct, computed, predicted):
    return tuple(x.new_empty(x.shape) for x in (state, update, predict, correct))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.rest = [x for x in inputs if not isinstance(x, Tensor)]


def _mix_gradients(ctx, grad):
    return *torch.ops.megascale.altup_mix_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


_fused_mix.register_autograd(_mix_gradients, setup_context=_setup)


@torch.library.custom_op("megascale::altup_predict", mutates_args=(), device_types="cpu")
def _fused_predict(state: Tensor, row: Tensor, computed: int) -> Tensor:
    return _predict(state, row, computed).contiguous()


@_fused_predict.register_kernel("cuda")
def _(state, row, computed):
    from megascale.kernels import altup_triton

    return altup_triton.predict(state, row, computed)


@_fused_predict.register_fake
def _(state, row, computed):
    return state.new_empty(*state.shape[:2], state.shape[3])


@torch.library.custom_op("megascale::altup_predict_backward", mutates_args=(), device_types="cpu")
def _fused_predict_backward(grad: Tensor, state: Tensor, row: Tensor, computed: int) -> tuple[Tensor, Tensor]:
    return _predict_backward(grad, state, row, computed)


@_fused_predict_backward.register_kernel("cuda")
def _(grad, state, row, computed):
    from megascale.kernels import altup_triton

    return altup_triton.predict_backward(grad, state, row, computed)


@_fused_predict_backward.register_fake
def _(grad, state, row, computed):
    return state.new_empty(state.shape), row.new_empty(row.shape)


def _predict_gradients(ctx, grad):
    return *torch.ops.megascale.altup_predict_backward(grad, *ctx.saved_tensors, *ctx.rest), None


_fused_predict.register_autograd(_predict_gradients, setup_context=_setup)


@torch.library.custom_op("megascale::altup_add_to_block", mutates_args=("state",))
def _add_to_block(state: Tensor, block: Tensor, computed: int) -> None:
    """x_j += block, in place: inductor would write all K blocks anew."""
    state.select(2, computed).add_(block)


@_add_to_block.register_fake
def _(state, block, computed):
    return None


class _Split(torch.autograd.Function):
    """Both outputs are views. Their gradients meet here and not in the state's K-wide sum."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, computed: int, fused: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.computed, ctx.fused = state.shape, computed, fused
        return state.select(2, computed), state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad_block: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_block is None:
            return grad_state, None, None
        if grad_state is None:
            grad_state = grad_block.new_zeros(ctx.shape)
        # In place: the gradient of the second output comes from `altup_mix` and `altup_predict` alone, which have just made it.
        if ctx.fused:
            _add_to_block(grad_state, grad_block, ctx.computed)
        else:
            grad_state.select(2, ctx.computed).add_(grad_block)
        return grad_state, None, None


def altup_split(state: Tensor, computed: int, fused: bool | None = None) -> tuple[Tensor, Tensor]:
    """What a layer computes on, and what the mix takes: the block x_j [T, P, d] and the state [T, P, K, d], both views of the state.

    The gradient of x_j is added to block j of the other's, in place: for the second output, use `altup_mix` and `altup_predict` only.
    """
    return _Split.apply(state, computed, is_fused(state, fused, _fits(state)))


def altup_predict(state: Tensor, row: Tensor, computed: int, fused: bool | None = None) -> Tensor:
    """xh_j = x_j + sum_k c_jk x_k.

    Args:
        state: [T, P, K, d].
        row: c_j, [K] or [T, P, K].
        computed: j.
        fused: by the kernel, or in plain PyTorch; none = by the kernel where it gains.

    Returns: [T, P, d], dtype of the state.
    """
    if is_fused(state, fused, _fits(state)):
        return _fused_predict(state, row, computed)
    return _Predict.apply(state, row, computed)


def altup_mix(
    state: Tensor,
    update: Tensor,
    predict: Tensor,
    correct: Tensor,
    computed: int,
    predicted: bool,
    fused: bool | None = None,
) -> Tensor:
    """The next state: predict and correct of all blocks.

    Args:
        state: [T, P, K, d], or [T, 1, K, d] for the same blocks in every stream; strides as they come, those of expanded dimensions too.
        update: F, [T, P, d].
        predict: c, [K, K], or [T, P, K, K] ([T, 1, K, K] with such a state).
        correct: e, [K] or [T, P, K]; static if c is.
        computed: j.
        predicted: whether the layer read xh_j, not x_j.
        fused: by the kernel, or in plain PyTorch; none = by the kernel where it gains.

    Returns: [T, P, K, d], dtype of the state.
    """
    if is_fused(state, fused, _fits(state)):
        return _fused_mix(state, update, predict, correct, computed, predicted)
    return _Mix.apply(state, update, predict, correct, computed, predicted)
