"""Micro-batches: packed sequences of concatenated documents, as tensors.

Shapes: B sequences of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from megascale.config.errors import InputError
from megascale.data.corpus import Split
from megascale.kernels.transfer import send
from megascale.model.loss import IGNORED


@dataclass(frozen=True)
class MicroBatch:
    """B packed sequences.

    Attributes:
        tokens: ids, int64 [B, S].
        labels: the id that follows each token, or `IGNORED`, int64 [B, S].
        positions: place of each token in its document, from 0 where the document or the sequence starts, int64 [B, S].
        documents: number of the document inside the sequence, from 0, non-decreasing along S, int32 [B, S].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, without waiting for it. Documents stay: how many start where is counted on the host, because a device would
        have to be waited for.
        """
        tokens, labels, positions = (send(x, device) for x in (self.tokens, self.labels, self.positions))
        return MicroBatch(tokens, labels, positions, self.documents)

    @cached_property
    def loss_tokens(self) -> int:
        """Number of labels that are learned."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Rows:
    """The arrays of a micro-batch before they become tensors; see `MicroBatch`."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray

    @classmethod
    def empty(cls, sequences: int, length: int) -> Rows:
        """Arrays to be filled, [sequences, length]."""
        shape = (sequences, length)
        return cls(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32))

    def place(self, where: np.ndarray, rows: Rows) -> None:
        """Copies rows to the places `where` [n]."""
        self.tokens[where], self.labels[where] = rows.tokens, rows.labels
        self.positions[where], self.documents[where] = rows.positions, rows.documents

    def tensors(self) -> MicroBatch:
        """The micro-batch that shares this memory."""
        return MicroBatch(*(torch.from_numpy(array) for array in (self.tokens, self.labels, self.positions, self.documents)))


@dataclass(frozen=True)
class SequenceSet:
    """A split cut into sequences: sequence i holds tokens i*S up to (i+1)*S, and its labels are one token further.

    Attributes:
        name: of the source.
        length: S.
        attention: ``document``: positions restart at each document; ``causal``: they run on, all is one document.
        vocab_size: ids must be below it.
        last_padded: keep the last, short sequence, filled up with `IGNORED` labels, so that every token is scored once;
            else it is dropped.
    """

    name: str
    split: Split
    length: int
    attention: Literal["document", "causal"]
    vocab_size: int
    last_padded: bool

    def __len__(self) -> int:
        labels = max(self.split.length - 1, 0)
        return -(-labels // self.length) if self.last_padded else labels // self.length

    def sequences(self, indices: range | list[int] | np.ndarray) -> MicroBatch:
        """The sequences of these numbers, each in [0, len(self)).

        Raises:
            InputError: the file holds an id outside the vocabulary.
        """
        return self.rows(np.asarray(indices, np.int64)).tensors()

    def rows(self, indices: np.ndarray) -> Rows:
        """Like `sequences`, as arrays."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"{self.name} has sequences 0 to {len(self) - 1}, asked for {indices.min()} to {indices.max()}")
        starts = indices[:, None] * self.length
        wanted = starts + np.arange(self.length + 1)
        at = np.minimum(wanted, self.split.length - 1)
        documents = self.split.documents_at(at)
        ids = self.split.tokens_at(at, documents)
        self._check(ids, indices)
        labels = ids[:, 1:].copy()
        labels[wanted[:, 1:] >= self.split.length] = IGNORED
        if not self.split.starts_with_separator:
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORED
        tokens, documents = np.ascontiguousarray(ids[:, :-1]), documents[:, :-1]
        if self.attention == "causal":
            positions = np.broadcast_to(np.arange(self.length), tokens.shape).copy()
            return Rows(tokens, labels, positions, np.zeros(tokens.shape, np.int32))
        positions = wanted[:, :-1] - np.maximum(self.split.starts[documents], starts)
        return Rows(tokens, labels, positions, (documents - documents[:, :1]).astype(np.int32))

    def _check(self, ids: np.ndarray, indices: np.ndarray) -> None:
        if not ids.size or (ids.max() < self.vocab_size and ids.min() >= 0):
            return
        row, column = np.argwhere((ids >= self.vocab_size) | (ids < 0))[0]
        place = f"{self.split.place}, token {int(indices[row]) * self.length + int(column)} of the split"
        reason = f"id {ids[row, column]} is outside the vocabulary of {self.vocab_size}"
        raise InputError(place, reason, "check the tokenizer and model.vocab_size; `megascale data verify` finds damaged files")
