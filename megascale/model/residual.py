"""The residual of one block, and of K blocks (AltUp). T tokens, P streams, K blocks, d width; the state is [T, P, K, d], before the first
layer [T, 1, K, d]: what a layer adds may have more streams than what it read.

Every residual answers expand(embedding), read(state, layer), write(state, layer, ...) and contract(state).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megascale.config.schema import AltUp as AltUpConfig


def computed_block(layer: int, altup: AltUpConfig) -> int:
    """j*, the block that a layer computes on (arXiv 2301.13310, section 3: alternating)."""
    return layer % altup.blocks if altup.select == "alternating" else 0


class SingleResidual(nn.Module):
    """The plain residual: K = 1. Expand, read and contract are views."""

    def read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The block to compute on [T, P, d], and the state as `write` wants it."""
        return state.squeeze(2), state

    def write(self, state: Tensor, attended: Tensor, attention: Tensor, feed_forward: Tensor) -> Tensor:
        """The next state from x + attention and the feed-forward's output."""
        return (attended + feed_forward).unsqueeze(2)


class AltUpResidual(nn.Module):
    """One AltUp layer's predict and correct (arXiv 2301.13310, Algorithm 1), in the form that keeps small updates.

    predict  xh_i = x_i + sum_k dp_ik x_k
    correct  x'_i = xh_i + (1 + dg_i) (F + r - xh_j),   F = attention + feed-forward, r the block that was read

    With `read: old` r = x_j, so r - xh_j = -sum_k dp_jk x_k; with `predicted` r = xh_j and the difference vanishes. dp = dg = 0 is the
    plain residual x + F in every block, bit for bit. dp [K, K] and dg [K] are fp32 parameters. The mix runs in fp32 and is rounded once.
    """

    def __init__(self, altup: AltUpConfig, layer: int):
        super().__init__()
        self.computed, self.predicted = computed_block(layer, altup), altup.read == "predicted"
        self.predict = nn.Parameter(torch.zeros(altup.blocks, altup.blocks))
        self.correct = nn.Parameter(torch.zeros(altup.blocks))

    def _predictions(self, blocks: tuple[Tensor, ...], row: int) -> Tensor:
        wide = self.predict.dtype
        return sum((self.predict[row, k] * block.to(wide) for k, block in enumerate(blocks)), torch.zeros((), dtype=wide))

    def read(self, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # unbind, not select: the backward of unbind stacks the K gradients once, that of select fills a K-wide zero tensor
        blocks = state.unbind(2)
        x = blocks[self.computed]
        return ((x + self._predictions(blocks, self.computed)).to(x.dtype) if self.predicted else x), blocks

    def write(self, blocks: tuple[Tensor, ...], attended: Tensor, attention: Tensor, feed_forward: Tensor) -> Tensor:
        wide = self.predict.dtype
        delta = attention.to(wide) + feed_forward.to(wide)
        predictions = [self._predictions(blocks, i) for i in range(len(blocks))]
        if not self.predicted:
            delta = delta - predictions[self.computed]
        new = [
            block + mixed + (1 + self.correct[i]) * delta
            for i, (block, mixed) in enumerate(zip(blocks, predictions, strict=True))
        ]
        return torch.stack(new, 2).to(blocks[0].dtype)


def expand(embedding: Tensor, streams: int, blocks: int) -> Tensor:
    """[T, d] -> [T, P, K, d]: the same embedding for every stream (ParScale) and every block (Recycled-AltUp), as a view."""
    return embedding[:, None, None, :].expand(-1, streams, blocks, -1)


def contract(state: Tensor) -> Tensor:
    """[T, P, K, d] -> [T, P, d]: the sum of the blocks (Recycled-AltUp, arXiv 2301.13310, section 4.1); a view for K = 1."""
    return state.squeeze(2) if state.shape[2] == 1 else state.sum(2)
