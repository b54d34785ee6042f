"""The training data: several sources, blended by weight, each shuffled anew in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megascale.data.batches import MicroBatch, Rows, SequenceSet
from megascale.data.order import blend, blend_counts, permute


@dataclass(frozen=True)
class BlendedSource:
    """A source of a blend; `digest` of its corpus keys its order, so that it does not change with the corpus's place."""

    sequences: SequenceSet
    weight: float
    digest: str


@dataclass(frozen=True)
class Located:
    """Where draws of a blend come from: source, its epoch, and its sequence, each int64 [n]."""

    sources: np.ndarray
    epochs: np.ndarray
    sequences: np.ndarray


class Blend:
    """An endless line of training sequences. The i-th one depends on seed, sources, weights and i alone.

    Args:
        sources: with at least one sequence each.
        seed: of the order.
    """

    def __init__(self, sources: Sequence[BlendedSource], seed: int):
        assert sources and all(len(source.sequences) for source in sources)
        self.sources, self.seed = tuple(sources), seed
        self.weights = [source.weight for source in sources]

    def sequences(self, indices: range | Sequence[int] | np.ndarray) -> MicroBatch:
        """The training sequences of these numbers, counted from the start of the run.

        Raises:
            InputError: a file holds an id outside the vocabulary.
        """
        found = self.locate(indices)
        rows = Rows.empty(len(found.sources), self.sources[0].sequences.length)
        for number in np.unique(found.sources).tolist():
            where = np.flatnonzero(found.sources == number)
            rows.place(where, self.sources[number].sequences.rows(found.sequences[where]))
        return rows.tensors()

    def locate(self, indices: range | Sequence[int] | np.ndarray) -> Located:
        """Source, epoch and sequence of each draw; inside an epoch every sequence of a source comes exactly once."""
        drawn = np.asarray(indices, np.int64)
        assert not len(drawn) or drawn.min() >= 0
        numbers, ordinals = blend(drawn, self.weights)
        epochs, chosen = np.zeros_like(ordinals), np.zeros_like(ordinals)
        for number in np.unique(numbers).tolist():
            source, mine = self.sources[number], numbers == number
            count = len(source.sequences)
            epochs[mine] = ordinals[mine] // count
            for epoch in np.unique(epochs[mine]).tolist():
                where = mine & (epochs == epoch)
                chosen[where] = permute(ordinals[where] % count, count, f"{self.seed}/{source.digest}/{epoch}")
        return Located(numbers, epochs, chosen)

    def progress(self, consumed: int) -> dict[str, float]:
        """Metrics after the first `consumed` sequences: passes over each source, and its share of the sequences."""
        metrics = {}
        for source, count in zip(self.sources, blend_counts(consumed, self.weights), strict=True):
            metrics[f"data/epoch/{source.sequences.name}"] = count / len(source.sequences)
            metrics[f"data/share/{source.sequences.name}"] = count / max(consumed, 1)
        return metrics
