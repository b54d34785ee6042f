"""AltUp: a layer computes on one of K blocks, predicts and corrects the others (arXiv 2301.13310, Algorithm 1; `megascale.kernels.altup`).

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.kernels.altup import altup_mix, altup_predict, altup_split, why_plain
from megascale.model.attention import Packing

Parts = tuple[Tensor, ...]
"""What a residual takes of a state, as views: the block [T, P, d] that is computed; of K > 1 blocks also the whole, [T, P, K, d]. One
stream, [T, 1, ...], where the streams still agree.
"""


class AltUpResidual(nn.Module):
    """The residual of K blocks, see the module's docstring. All its parameters are fp32 and do not decay."""

    def __init__(self, model: Model, computed: int):
        super().__init__()
        blocks, width = model.altup.blocks, model.width
        self.computed, self.predicted, self.eps = computed, model.altup.read == "predicted", model.norm_eps
        self.by_token = model.altup.coefficients == "token"
        self.fused: bool | None = None
        """whether the kernels are used (`megascale.kernels.altup`)"""
        self.why_plain = why_plain(blocks, width)
        """why a GPU has none for it, in words; empty: it has"""
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

    def split(self, state: Tensor) -> Parts:
        """The block that is computed, and the whole state."""
        return altup_split(state, self.computed, self.fused)

    def _prediction(self, parts: Parts) -> Tensor:
        """c, [K, K] or [T, P, K, K]."""
        if not self.by_token:
            return self.predict
        return F.linear(self._modalities(parts[0]), self.predict).unflatten(-1, (parts[1].shape[2], -1))

    def coefficients(self, parts: Parts, update: Tensor) -> tuple[Tensor, Tensor]:
        """c [K, K] and e [K], or each token's own, [T, P, K, K] and [T, P, K]."""
        predict = self._prediction(parts)
        if not self.by_token:
            return predict, self.correct
        return predict, F.linear(self._modalities(self._read(parts, predict).to(predict.dtype) + update), self.correct)

    def read(self, parts: Parts, packing: Packing | None = None) -> Tensor:
        """The block that the layer computes on, [T, P, d]: as it is, or as predicted."""
        return self._read(parts, self._prediction(parts)) if self.predicted else parts[0]

    def _read(self, parts: Parts, predict: Tensor) -> Tensor:
        if not self.predicted:
            return parts[0]
        return altup_predict(parts[1], predict[..., self.computed, :], self.computed, self.fused)

    def combine(self, attended: Tensor, attention: Tensor, feed_forward: Tensor) -> Tensor:
        """F."""
        return attention + feed_forward

    def forward(self, parts: Parts, update: Tensor, packing: Packing | None = None) -> Tensor:
        """The next state [T, P, K, d]."""
        return altup_mix(parts[1], update, *self.coefficients(parts, update), self.computed, self.predicted, self.fused)

    def mixing(self, parts: Parts, update: Tensor) -> Tensor:
        """A [K, K] of x' = A x + (1 + e) F, in fp64: how the blocks alone pass through the layer; the mean over tokens and streams."""
        predict, correct = (
            x.double().flatten(0, 1).mean(0) if self.by_token else x.double() for x in self.coefficients(parts, update)
        )
        mixed = predict + torch.eye(len(predict), dtype=predict.dtype, device=predict.device)
        if self.predicted:
            return mixed
        return mixed - (1 + correct)[:, None] * predict[self.computed]
