"""Corpora as readers see them: splits of concatenated documents, memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megascale.config.errors import InputError
from megascale.data.manifest import PREPARE_AGAIN, check_sizes, prepare_command, read_manifest


@dataclass(frozen=True)
class Split:
    """N documents laid end to end: one line of `length` tokens.

    Attributes:
        place: what errors call it.
        ids: the token file, any integer type, [file tokens].
        starts: where each document starts on the line, strictly increasing from 0, int64 [N].
        shifts: place in the file minus place on the line, for each document, int64 [N]; None: the line is the file.
        length: tokens on the line.
        starts_with_separator: whether each document starts with the separator, which ends the one before it.
    """

    place: str
    ids: np.ndarray
    starts: np.ndarray
    shifts: np.ndarray | None
    length: int
    starts_with_separator: bool

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        """Index of the document at each position of the line; int64, shape as given."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def tokens_at(self, positions: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Ids at positions of the line, given the documents there; int64, shape as given."""
        where = positions if self.shifts is None else positions + self.shifts[documents]
        return self.ids[where].astype(np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids from `start` up to, not including, `stop`; int64 [stop - start]."""
        positions = np.arange(start, min(stop, self.length))
        return self.tokens_at(positions, self.documents_at(positions))

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, int64."""
        stop = int(self.starts[index + 1]) if index + 1 < len(self.starts) else self.length
        return self.tokens(int(self.starts[index]), stop)


@dataclass(frozen=True)
class Corpus:
    """A corpus that is open for reading.

    Attributes:
        path: as the user gave it.
        name: last part of the path.
        digest: changes with the tokens, the documents or the tokenizer.
        vocab_size: ids of its tokenizer; None if it is not known.
        largest_id: largest id that occurs; for Megatron pairs, among those that were looked at.
        tokenizer: path of the tokenizer.json; None if the corpus has none.
        tokenizer_digest: see `megascale.data.tokenizer`.
    """

    path: str
    name: str
    digest: str
    vocab_size: int | None
    largest_id: int
    tokenizer: Path | None
    tokenizer_digest: str | None
    train: Split
    validation: Split


def open_corpus(path: str) -> Corpus:
    """Opens a folder made by `megascale prepare`. Cheap: checks sizes and document starts, not digests.

    Raises:
        InputError: missing or damaged manifest, missing or truncated files, document starts that do not fit the tokens.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    train, validation = (
        _open_split(folder, split, dtype, manifest.splits[split].tokens, manifest.splits[split].documents)
        for split in ("train", "validation")
    )
    return Corpus(
        path=path,
        name=folder.resolve().name,
        digest=manifest.content_digest(),
        vocab_size=manifest.vocab_size,
        largest_id=manifest.largest_id,
        tokenizer=folder / "tokenizer.json",
        tokenizer_digest=manifest.tokenizer_digest,
        train=train,
        validation=validation,
    )


def _open_split(folder: Path, split: str, dtype: np.dtype, tokens: int, documents: int) -> Split:
    ids = map_file(folder / f"{split}.tokens", dtype)
    starts = map_file(folder / f"{split}.documents", np.dtype("<i8"))
    place = str(folder / f"{split}.documents")
    remedy = PREPARE_AGAIN.format(command=prepare_command(folder))
    if len(ids) != tokens or len(starts) != documents:
        raise InputError(
            place, f"{len(ids)} tokens and {len(starts)} documents, the manifest has {tokens} and {documents}", remedy
        )
    if len(starts) and (starts[0] != 0 or starts[-1] >= tokens or (np.diff(starts) <= 0).any()):
        raise InputError(place, "document starts are not increasing from 0 to the number of tokens", remedy)
    return Split(str(folder / f"{split}.tokens"), ids, starts, None, tokens, starts_with_separator=True)


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only, memory-mapped array [elements]; an empty file as an empty array."""
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)
