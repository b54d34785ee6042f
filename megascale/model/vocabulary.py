"""The two ends of the decoder: embedding and head, whose rows (the vocabulary) may be shared by tensor-parallel ranks.

T tokens, d width, V vocabulary, v of its rows here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.model.exchange import Exchange, Split, identity, whole_vocabulary
from megascale.model.loss import JoinVocabulary, linear_cross_entropy


class Embedding(nn.Module):
    """Rows of the vocabulary: ids [T] -> [T, d]. Rows held elsewhere count as zero here; `scatter_tokens` adds them."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.splits = {"weight": Split(0, "tp", vocabulary)}
        self.vocabulary, self.first_row = vocabulary, 0
        self.scatter_tokens: Exchange = identity

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        if rows == self.vocabulary:
            return self.scatter_tokens(F.embedding(tokens, self.weight))
        local = tokens - self.first_row
        here = (local >= 0) & (local < rows)
        return self.scatter_tokens(F.embedding(torch.where(here, local, 0), self.weight) * here[:, None])


class Head(nn.Module):
    """Logits of the vocabulary's rows here, and the loss over all rows."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.splits = {"weight": Split(0, "tp", vocabulary)}
        self.vocabulary, self.first_row = vocabulary, 0
        self.gather_tokens: Exchange = identity
        self.join_vocabulary: JoinVocabulary = whole_vocabulary
        self.join_logits: Exchange = identity

    def forward(self, x: Tensor) -> Tensor:
        """Logits [T, V] of x [T, d]."""
        return self.join_logits(F.linear(self.gather_tokens(x), self.weight))

    def loss(self, x: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See `linear_cross_entropy`; labels of all tokens, x of those that this rank holds."""
        return linear_cross_entropy(self.gather_tokens(x), self.weight, labels, scale, self.first_row, self.join_vocabulary)
