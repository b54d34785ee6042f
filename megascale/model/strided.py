"""Sequence-AltUp: a layer computes on every k-th token and corrects the others by it (arXiv 2301.13310, section 4.2).

T tokens, T' of them kept, P streams, d width. tau(t) is the last kept token up to t; kept are the positions 0, k, 2k, ... of each document:

    predict  yh_t = a1 x_t + a2 x_tau
    correct  y_t = yh_t + b (y_tau - yh_tau),    y_tau = x_tau + F_tau,    F attention + feed-forward among the kept tokens

With a1 = 1, a2 = 0, b = 1, the start, each token gets the update of its kept one: y_t = x_t + F_tau.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megascale.kernels.dispatch import take_rows
from megascale.model.altup import Parts
from megascale.model.attention import Packing


class SequenceResidual(nn.Module):
    """predict = (a1 - 1, a2) and correct = (b - 1), fp32, without weight decay. The sums run in fp32 and are rounded once."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Parameter(torch.zeros(2))
        self.correct = nn.Parameter(torch.zeros(1))
        self.fused: bool | None = None
        """whether its kernels are used (`megascale.kernels.fused.is_fused`)"""

    def split(self, state: Tensor) -> Parts:
        """The only block."""
        return (state.squeeze(2),)

    def read(self, parts: Parts, packing: Packing) -> Tensor:
        """The kept tokens [T', P, d] of the only block."""
        assert packing.kept is not None
        (x,) = parts
        kept = take_rows(x.flatten(1), packing.kept.tokens, packing.kept.place, some_nowhere=True, fused=self.fused)
        return kept.unflatten(1, x.shape[1:])

    def combine(self, attended: Tensor, attention: Tensor, feed_forward: Tensor) -> Tensor:
        """F of the kept tokens."""
        return attention + feed_forward

    def shift(self, kept: Tensor, update: Tensor) -> Tensor:
        """a2 x_tau + b (y_tau - yh_tau), [T', P, d] in fp32: what every token of the group gets, of x_tau and F_tau."""
        wide, read, (more, other) = self.predict.dtype, kept.to(self.predict.dtype), self.predict
        return other * read + (1 + self.correct) * (update.to(wide) - (more + other) * read)

    def add(self, x: Tensor, shift: Tensor) -> Tensor:
        """The next state [T, P, 1, d] of x [T, P, d] and the shift of each token's group."""
        wide = x.to(self.predict.dtype)
        return (wide + self.predict[0] * wide + shift).to(x.dtype).unsqueeze(2)

    def forward(self, parts: Parts, update: Tensor, packing: Packing) -> Tensor:
        """The next state [T, P, 1, d] of all tokens."""
        assert packing.kept is not None
        shift = self.shift(self.read(parts, packing), update)
        spread = take_rows(shift.flatten(1), packing.kept.group, packing.kept.members, True, self.fused)
        return self.add(parts[0], spread.unflatten(1, shift.shape[1:]))
