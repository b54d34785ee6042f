"""From shards to the files of a corpus folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megascale.data.digests import file_digest
from megascale.data.documents import PROBLEMS, DocumentSource
from megascale.data.manifest import SPLITS, BadDocument, Dtype, FileRecord, Manifest, SplitCounts, write_manifest
from megascale.data.survey import TRAIN, VALIDATION, Survey
from megascale.data.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size

_BAD_NAMES = 50
_CODES = {"train": TRAIN, "validation": VALIDATION}


@dataclass(frozen=True)
class _Written:
    """What was written for one split: ids, ids of each document (int64 [N]), largest id."""

    tokens: int
    lengths: np.ndarray
    largest_id: int


def assemble(
    folder: Path,
    tokenizer: Path,
    shards: list[Path],
    source: DocumentSource,
    found: Survey,
    separator_id: int,
    dtype: Dtype,
    recipe: str,
) -> None:
    """Writes a complete corpus folder, manifest last, everything flushed to disk.

    Args:
        folder: where to write; must not exist.
        tokenizer: the tokenizer.json that made the shards.
        shards: paths of all shards, in order.
    """
    folder.mkdir()
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    written = {split: _join(folder, split, shards, dtype) for split in SPLITS}
    _list_validation(folder / "documents.jsonl", source, found, written["validation"].lengths)
    loaded = load_tokenizer(tokenizer)
    separator = loaded.id_to_token(separator_id)
    assert separator is not None
    bad = np.flatnonzero(found.problems)[:_BAD_NAMES].tolist()
    manifest = Manifest(
        recipe=recipe,
        source=source.description,
        dtype=dtype,
        vocab_size=vocabulary_size(loaded),
        separator=separator,
        separator_id=separator_id,
        largest_id=max(split.largest_id for split in written.values()),
        tokenizer_digest=tokenizer_digest(tokenizer),
        splits={split: _counts(split, written[split], found) for split in SPLITS},
        bad_documents=found.problem_counts(),
        bad_names=[BadDocument(name=source.name(index), problem=PROBLEMS[found.problems[index]]) for index in bad],
        duplicates=found.duplicates,
        files={path.name: FileRecord(bytes=path.stat().st_size, digest=file_digest(path)) for path in sorted(folder.iterdir())},
    )
    write_manifest(folder, manifest)
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _join(folder: Path, split: str, shards: list[Path], dtype: str) -> _Written:
    """Writes `SPLIT.tokens` and `SPLIT.documents`."""
    all_lengths, tokens, largest = [np.zeros(0, np.int64)], 0, 0
    with open(folder / f"{split}.tokens", "wb") as file:
        for path in shards:
            with np.load(path, allow_pickle=False) as shard:
                ids, lengths = shard[split], shard[f"{split}_lengths"]
            file.write(ids.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes())
            all_lengths.append(lengths)
            tokens += len(ids)
            largest = max(largest, int(ids.max(initial=0)))
    lengths = np.concatenate(all_lengths)
    starts = np.cumsum(lengths) - lengths
    (folder / f"{split}.documents").write_bytes(starts.astype("<i8").tobytes())
    return _Written(tokens, lengths, largest)


def _counts(split: str, written: _Written, found: Survey) -> SplitCounts:
    size = int(found.sizes[found.splits == _CODES[split]].sum())
    return SplitCounts(tokens=written.tokens, documents=len(written.lengths), bytes=size)


def _list_validation(path: Path, source: DocumentSource, found: Survey, lengths: np.ndarray) -> None:
    """One line of JSON for each validation document, in the order of the tokens."""
    chosen = np.flatnonzero(found.splits == VALIDATION)
    with open(path, "w", encoding="utf-8") as file:
        for index, tokens in zip(chosen.tolist(), lengths.tolist(), strict=True):
            entry = {"name": source.name(index), "tokens": tokens, "bytes": int(found.sizes[index])}
            file.write(json.dumps(entry) + "\n")
