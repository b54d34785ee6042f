"""AltUp: a layer computes on one of K blocks, predicts and corrects the others (arXiv 2301.13310, Algorithm 1).

T tokens, P streams, K blocks, d width; j the block that is computed. In a form that keeps small updates and starts as the identity:

    predict  xh_i = x_i + sum_k c_ik x_k
    correct  x'_i = xh_i + (1 + e_i) (F + r - xh_j)        F attention + feed-forward, r the block that was read

With `read: old` r = x_j, so that r - xh_j = -sum_k c_jk x_k; with `predicted` r = xh_j and the difference vanishes. c = e = 0 is the plain
residual x + F in every block. The mix runs in fp32 and is rounded once; F has the precision of the state.

Coefficients are static, c [K, K] and e [K]; or each token's own, c [T, P, K, K] and e [T, P, K], as in Gemma 3n (class AltUp of
google-deepmind/gemma, gm/nn/gemma3n): with m(u) = tanh(W RMSNorm(u) / d) in R^K,

    c_ik = sum_p predict[i*K + k, p] m_p(x_j)               e_i = sum_p correct[i, p] m_p(r + F)

Both start at 0 here, W at N(0, d): the layer starts as the identity while the m are of order one, so that gradients flow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import Packing

Blocks = tuple[Tensor, ...]
"""K tensors [T, P, d], views of one state; or [T, 1, d] where the streams still agree."""


def _weighted(coefficients: Tensor, blocks: Blocks) -> Tensor:
    """sum_k c_k x_k in the precision of the coefficients [K] or [T, P, K]."""
    total = coefficients[..., 0, None] * blocks[0].to(coefficients.dtype)
    for k in range(1, len(blocks)):
        total = total + coefficients[..., k, None] * blocks[k].to(coefficients.dtype)
    return total


def _along(product: Tensor, coefficient: Tensor) -> Tensor:
    """The gradient of a coefficient (0-dimensional, or [T, P]) that multiplied something [T, P, d]: products summed over the rest."""
    return product.sum() if coefficient.ndim == 0 else product.sum(-1).sum_to_size(coefficient.shape)


class _Predict(torch.autograd.Function):
    """x_j + sum_k c_k x_k in the precision of the blocks. Saves no more than its inputs, of which the blocks are there anyway."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, computed: int, *blocks: Tensor) -> Tensor:
        ctx.save_for_backward(row, *blocks)
        ctx.computed = computed
        return (blocks[computed] + _weighted(row, blocks)).to(blocks[0].dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row, *blocks = ctx.saved_tensors
        wide = grad.to(row.dtype)
        grad_row = torch.stack([_along(wide * x, row[..., k]) for k, x in enumerate(blocks)], -1)
        grads = [(row[..., k, None] + (k == ctx.computed)) * wide for k in range(len(blocks))]
        return grad_row, None, *(g.to(x.dtype).sum_to_size(x.shape) for g, x in zip(grads, blocks, strict=True))


class _Mix(torch.autograd.Function):
    """Predict and correct of all blocks; returns the state [T, P, K, d]. Saves no more than its inputs: the blocks and the update.

    Backward, with S = sum_k (1 + e_k) dx'_k: dF = S; dxh_i = dx'_i, less S for i = j with `read: old`; dc_ik = <dxh_i, x_k>;
    de_i = <dx'_i, F + r - xh_j>; dx_k = dx'_k + sum_i c_ik dxh_i.
    """

    @staticmethod
    def forward(
        ctx: Any, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool, *blocks: Tensor
    ) -> Tensor:
        ctx.save_for_backward(update, predict, correct, *blocks)
        ctx.computed, ctx.predicted = computed, predicted
        delta = _Mix.innovation(update, predict, computed, predicted, blocks)
        new = [
            (x + _weighted(predict[..., i, :], blocks) + (1 + correct[..., i, None]) * delta).to(x.dtype)
            for i, x in enumerate(blocks)
        ]
        return torch.stack(new, 2)

    @staticmethod
    def innovation(update: Tensor, predict: Tensor, computed: int, predicted: bool, blocks: Blocks) -> Tensor:
        """F + r - xh_j."""
        wide = update.to(predict.dtype)
        return wide if predicted else wide - _weighted(predict[..., computed, :], blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        update, predict, correct, *blocks = ctx.saved_tensors
        delta = _Mix.innovation(update, predict, ctx.computed, ctx.predicted, tuple(blocks))
        grads = [g.to(predict.dtype) for g in grad.unbind(2)]
        grad_correct = torch.stack([_along(g * delta, correct[..., i]) for i, g in enumerate(grads)], -1)
        total = _weighted(1 + correct, tuple(grads))
        mixed = [g if ctx.predicted or i != ctx.computed else g - total for i, g in enumerate(grads)]
        rows = [torch.stack([_along(g * x, predict[..., i, k]) for k, x in enumerate(blocks)], -1) for i, g in enumerate(mixed)]
        grad_blocks = [grads[k] + _weighted(predict[..., :, k], tuple(mixed)) for k in range(len(blocks))]
        back = [g.to(x.dtype).sum_to_size(x.shape) for g, x in zip(grad_blocks, blocks, strict=True)]
        return total.to(update.dtype), torch.stack(rows, -2), grad_correct, None, None, *back


class AltUpResidual(nn.Module):
    """The residual of K blocks, see the module's docstring. All its parameters are fp32 and do not decay."""

    def __init__(self, model: Model, computed: int):
        super().__init__()
        blocks, width = model.altup.blocks, model.width
        self.computed, self.predicted, self.eps = computed, model.altup.read == "predicted", model.norm_eps
        self.by_token = model.altup.coefficients == "token"
        self.predict = nn.Parameter(torch.zeros(blocks**2, blocks) if self.by_token else torch.zeros(blocks, blocks))
        self.correct = nn.Parameter(torch.zeros(blocks, blocks) if self.by_token else torch.zeros(blocks))
        if self.by_token:
            self.modality = nn.Parameter(torch.empty(blocks, width))
            self.modality_norm = nn.Parameter(torch.ones(width))

    def _modalities(self, u: Tensor) -> Tensor:
        """tanh(W RMSNorm(u) / d), [T, P, K] of u [T, P, d]; the norm's weight is folded into W."""
        wide = u.to(self.modality.dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) / u.shape[-1]
        return (F.linear(wide, self.modality * self.modality_norm) * scale).tanh()

    def _prediction(self, blocks: Blocks) -> Tensor:
        """c, [K, K] or [T, P, K, K]."""
        if not self.by_token:
            return self.predict
        return F.linear(self._modalities(blocks[self.computed]), self.predict).unflatten(-1, (len(blocks), -1))

    def coefficients(self, blocks: Blocks, update: Tensor) -> tuple[Tensor, Tensor]:
        """c [K, K] and e [K], or each token's own, [T, P, K, K] and [T, P, K]."""
        predict = self._prediction(blocks)
        if not self.by_token:
            return predict, self.correct
        return predict, F.linear(self._modalities(self._read(blocks, predict).to(predict.dtype) + update), self.correct)

    def read(self, blocks: Blocks, packing: Packing | None = None) -> Tensor:
        """The block that the layer computes on, [T, P, d]: as it is, or as predicted."""
        return self._read(blocks, self._prediction(blocks)) if self.predicted else blocks[self.computed]

    def _read(self, blocks: Blocks, predict: Tensor) -> Tensor:
        if not self.predicted:
            return blocks[self.computed]
        return _Predict.apply(predict[..., self.computed, :], self.computed, *blocks)

    def combine(self, attended: Tensor, attention: Tensor, feed_forward: Tensor) -> Tensor:
        """F."""
        return attention + feed_forward

    def forward(self, blocks: Blocks, update: Tensor, packing: Packing | None = None) -> Tensor:
        """The next state [T, P, K, d]."""
        return _Mix.apply(update, *self.coefficients(blocks, update), self.computed, self.predicted, *blocks)

    def mixing(self, blocks: Blocks, update: Tensor) -> Tensor:
        """A [K, K] of x' = A x + (1 + e) F, in fp64: how the blocks alone pass through the layer; the mean over tokens and streams."""
        predict, correct = (
            x.double().flatten(0, 1).mean(0) if self.by_token else x.double() for x in self.coefficients(blocks, update)
        )
        mixed = predict + torch.eye(len(blocks), dtype=predict.dtype, device=predict.device)
        if self.predicted:
            return mixed
        return mixed - (1 + correct)[:, None] * predict[self.computed]
