"""How often each token id occurs in the training corpora, for hash routers that balance by it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megascale.data.blend import Blend

MOST_TOKENS = 2**24
"""Tokens counted of a source: enough for the frequencies that matter, seconds to read whatever the corpus's size."""
PIECE = 2**16


def unigram_counts(train: Blend, vocabulary: int) -> Tensor:
    """Shares of the ids in the blend, fp64 [vocabulary], scaled to the number of tokens counted.

    Of each source up to 2^24 tokens are read, in pieces spread evenly over it, and weighted as the blend does. A function of the corpora
    alone: every rank finds the same.
    """
    total = sum(train.weights)
    shares = np.zeros(vocabulary)
    for source, weight in zip(train.sources, train.weights, strict=True):
        split = source.sequences.split
        pieces = max(min(MOST_TOKENS, split.length) // PIECE, 1)
        starts = np.linspace(0, max(split.length - PIECE, 0), pieces).astype(np.int64)
        counts = np.zeros(vocabulary, np.int64)
        for start in starts.tolist():
            counts += np.bincount(split.tokens(start, start + PIECE), minlength=vocabulary)
        shares += weight / total * counts / counts.sum()
    return torch.from_numpy(shares * MOST_TOKENS)
