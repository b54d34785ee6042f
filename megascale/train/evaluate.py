"""The loss of a loaded run on held-out text: all of it, every token scored once, with or without overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megascale.config.errors import InputError
from megascale.data.batches import IGNORED, Rows, SequenceSet
from megascale.data.corpus import Split
from megascale.train.load_run import LoadedModel
from megascale.train.validate import held_out_loss


@dataclass(frozen=True)
class SlidingWindows(SequenceSet):
    """A split read through overlapping windows of S = `length` tokens, each `stride` further than the one before.

    The first window scores all of its labels, the others only the last `stride`, which the window before did not reach. So every
    token is scored once, and behind the first window with at least S - stride tokens before it (fewer where its document is
    younger). stride = S are the sequences of `SequenceSet`.
    """

    stride: int

    def __len__(self) -> int:
        labels = max(self.split.length - 1, 0)
        return 0 if not labels else 1 + max(-(-(labels - self.length) // self.stride), 0)

    def rows(self, indices: np.ndarray) -> Rows:
        """See `SequenceSet`."""
        starts = indices * self.stride
        windows = [self._window(int(start)) for start in starts]
        fields = ("tokens", "labels", "positions", "documents")
        rows = Rows(*(np.concatenate([getattr(window, field) for window in windows]) for field in fields))
        rows.labels[starts > 0, : self.length - self.stride] = IGNORED
        return rows

    def _window(self, start: int) -> Rows:
        """The S tokens from `start` on: the first sequence of the split that starts there."""
        split = self.split
        first = int(split.documents_at(np.array(start)))
        starts = np.maximum(split.starts[first:] - start, 0)
        shifts = (np.zeros(len(starts), np.int64) if split.shifts is None else split.shifts[first:]) + start
        rest = Split(split.place, split.ids, starts, shifts, split.length - start, split.starts_with_separator)
        return SequenceSet(self.name, rest, self.length, self.attention, self.vocab_size, True).rows(np.zeros(1, np.int64))


def evaluate(run: LoadedModel, sequences: SequenceSet, count: int | None, stride: int | None) -> dict[str, Any]:
    """Loss of a run on a set of sequences.

    Args:
        count: how many of the sequences (windows, with a stride), from the first on; None: all.
        stride: tokens from one window to the next; None: the sequence length, no overlap.

    Returns:
        loss (nats per token), perplexity, bits_per_byte and bytes (None where the tokenizer does not tell), tokens.
    """
    if stride is not None:
        split = sequences.split
        sequences = SlidingWindows(
            sequences.name, split, sequences.length, sequences.attention, sequences.vocab_size, True, stride
        )
    stages = run.stages
    found = held_out_loss(stages, sequences, len(sequences) if count is None else count, run.token_bytes, stages.mesh)
    loss, bits = found["loss"], found.get("bits_per_byte")
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # a double ends at e^709
        "bits_per_byte": bits,
        "tokens": int(found["tokens"]),
        "bytes": round(loss * found["tokens"] / math.log(2) / bits) if bits else None,
    }


def text_sequences(run: LoadedModel, path: Path) -> SequenceSet:
    """A text file as one held-out document.

    Raises:
        InputError: no such file, not UTF-8, empty; or the run has no tokenizer.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}", "name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"is not UTF-8 text: byte {error.start}", "convert it to UTF-8") from error
    ids = np.array(run.encode(text), np.int64)
    if len(ids) < 2:
        raise InputError(str(path), "holds too little text to score", "name a longer file")
    split = Split(str(path), ids, np.zeros(1, np.int64), None, len(ids), bool(run.start))
    size = run.config.model.vocab_size
    assert size is not None
    return SequenceSet(str(path), split, run.config.data.sequence_length, run.config.data.attention, size, True)


def validation_sequences(run: LoadedModel, source: str | None) -> Mapping[str, SequenceSet]:
    """The held-out sequences of all sources, or of one.

    Raises:
        InputError: nothing is held out, or no such source.
    """
    held_out = run.validation
    if not held_out:
        raise InputError(str(run.folder), "there is no held-out text", "give files: --text FILE")
    if source is None:
        return held_out
    if source not in held_out:
        raise InputError("--source", f"no held-out text of a source {source}", f"sources: {', '.join(held_out)}")
    return {source: held_out[source]}
