"""The first pass over a source: sizes, digests and problems of all documents; duplicates; the validation split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from megascale.config.errors import InputError
from megascale.data.documents import PROBLEMS, DocumentSource, Part
from megascale.data.workers import Workers

DROPPED, TRAIN, VALIDATION = 0, 1, 2
_DOCUMENTS_PER_TASK = 512


@dataclass(frozen=True)
class Survey:
    """What is known of N documents without keeping their text.

    Attributes:
        sizes: bytes of text, int64 [N]; 0 for bad documents.
        digests: xxh3-128 of the text, uint64 [N, 2].
        problems: index into `PROBLEMS`, uint8 [N].
        splits: DROPPED, TRAIN or VALIDATION, uint8 [N].
        duplicates: documents dropped because an earlier one has the same text.
    """

    sizes: np.ndarray
    digests: np.ndarray
    problems: np.ndarray
    splits: np.ndarray
    duplicates: int

    def digest(self) -> str:
        """Digest of the whole source, and of how it is split."""
        whole = xxhash.xxh3_128()
        for array in (self.sizes, self.digests, self.problems, self.splits):
            whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def problem_counts(self) -> dict[str, int]:
        """Bad documents by kind."""
        counts = Counter(self.problems.tolist())
        return {name: counts[index] for index, name in enumerate(PROBLEMS) if name and counts[index]}


def survey(source: DocumentSource, validation: float, workers: Workers) -> Survey:
    """Reads every document once.

    Args:
        validation: share of the documents held out. A document's side depends on its text only.

    Raises:
        InputError: no usable document, more than half of them bad, or none left to train on.
    """
    bounds = [*range(0, len(source), _DOCUMENTS_PER_TASK), len(source)]
    parts = (source.part(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True))
    results = list(workers.map(_survey_part, parts, len(bounds) - 1, "reading"))
    place = source.description["from"]
    if not results:
        raise InputError(place, "there are no documents", "check --from and --format")
    sizes, digests, problems = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
    _check_problems(place, source, problems)
    splits, duplicates = split_documents(digests, problems == 0, validation)
    if not (splits == TRAIN).any():
        raise InputError(place, "no document is left to train on", "lower --validation or give more documents")
    return Survey(sizes, digests, problems, splits, duplicates)


def _survey_part(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes, digests, problems = [], [], []
    for document in part.documents():
        sizes.append(len(document.content))
        digests.append(content_digest(document.content))
        problems.append(PROBLEMS.index(document.problem))
    return np.array(sizes, np.int64), np.array(digests, np.uint64).reshape(-1, 2), np.array(problems, np.uint8)


def content_digest(content: bytes) -> tuple[int, int]:
    """xxh3-128 of a text, as its high and low 64 bits."""
    value = xxhash.xxh3_128_intdigest(content)
    return value >> 64, value & 0xFFFFFFFFFFFFFFFF


def _check_problems(place: str, source: DocumentSource, problems: np.ndarray) -> None:
    bad = np.flatnonzero(problems)
    if 2 * len(bad) <= len(problems):
        return
    names = ", ".join(f"{source.name(index)} ({PROBLEMS[problems[index]]})" for index in bad[:5].tolist())
    raise InputError(place, f"{len(bad)} of {len(problems)} documents are bad: {names}", "check --format, --field and the files")


def split_documents(digests: np.ndarray, good: np.ndarray, validation: float) -> tuple[np.ndarray, int]:
    """Assigns documents to splits by their digests, keeping the first of equal ones.

    Args:
        digests: uint64 [N, 2].
        good: usable documents, bool [N].
        validation: share held out; if it is not 0, at least one of several documents is.

    Returns:
        Splits, uint8 [N], and the number of duplicates dropped.
    """
    candidates = np.flatnonzero(good)
    keys = digests[candidates].view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)
    _, first = np.unique(keys, return_index=True)
    kept = candidates[first]
    splits = np.zeros(len(digests), np.uint8)
    splits[kept] = TRAIN
    held_out = kept[digests[kept, 0] < np.uint64(validation * 2**64)]
    if validation > 0 and not len(held_out) and len(kept) > 1:
        # `unique` sorts, so the first kept document has the smallest digest: the next one to be held out.
        held_out = kept[:1]
    splits[held_out] = VALIDATION
    return splits, len(candidates) - len(kept)


def shard_bounds(sizes: np.ndarray, shard_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts documents into contiguous ranges of about `shard_bytes` of text."""
    shard = np.cumsum(sizes) // shard_bytes
    cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(sizes)]
    yield from zip(cuts[:-1], cuts[1:], strict=True)
