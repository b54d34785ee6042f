"""Entropy-regularised transport between tokens and experts by Sinkhorn's iteration (arXiv 1306.0895), in the log domain.

T tokens here, P streams (each a problem of its own), E experts. A plan has rows of sum 1 and columns of sum (tokens of the
population) / E. In the form softmax over experts of (logits + potentials) its rows are right for any potentials [P, E]: only those are
iterated, and only column sums are exchanged between ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale.model.exchange import Exchange

LEAST = 1e-30
"""Column sums below this, which fp32 rounds to nothing, count as it: such a column grows by e^69 / E in one iteration."""


def column_sums(logits: Tensor, potentials: Tensor) -> Tensor:
    """The plan's column sums over the tokens here, [P, E], of logits [T, P, E]."""
    return (logits + potentials).softmax(-1).sum(0)


def column_error(columns: Tensor) -> Tensor:
    """Largest relative distance of a column from the even share, [P], of the population's column sums [P, E]."""
    return (columns * columns.shape[1] / columns.sum(-1, keepdim=True) - 1).abs().amax(-1)


def sinkhorn(logits: Tensor, population_sum: Exchange, iterations: int, tolerance: float | None) -> Tensor:
    """The potentials [P, E] after some iterations on logits [T, P, E], fp32, without a gradient.

    An iteration sets the columns right and, by the softmax, the rows. A stream whose columns are right within `tolerance` (relative, the
    largest of them) keeps its potentials; the loop itself always runs `iterations` times, so that nothing waits for the device.
    """
    potentials = logits.new_zeros(logits.shape[1:])
    for _ in range(iterations):
        columns = population_sum(column_sums(logits, potentials))
        even = columns.sum(-1, keepdim=True) / columns.shape[1]
        moved = potentials + even.log() - columns.clamp_min(LEAST).log()
        if tolerance is not None:
            moved = torch.where(column_error(columns)[:, None] > tolerance, moved, potentials)
        potentials = moved
    return potentials
