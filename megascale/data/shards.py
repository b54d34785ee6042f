"""Shards: the tokens of a contiguous range of documents, written by a worker and kept until the corpus is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megascale.config.errors import InputError
from megascale.data.digests import file_digest
from megascale.data.documents import Part
from megascale.data.survey import DROPPED, TRAIN, VALIDATION, content_digest
from megascale.data.tokenizer import encode, load_tokenizer

_BATCH_BYTES = 1 << 20
_CODES = {"train": TRAIN, "validation": VALIDATION}


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to write one shard.

    Attributes:
        splits: split of each document of the part, uint8 [n].
        digests: what the survey saw, uint64 [n, 2].
        folder: where the shard goes.
        index: number of the shard.
    """

    part: Part
    splits: np.ndarray
    digests: np.ndarray
    tokenizer: Path
    separator_id: int
    dtype: str
    folder: Path
    index: int


def shard_path(folder: Path, index: int) -> Path | None:
    """The finished, undamaged shard of this number, if there is one. Its digest is part of its name."""
    for path in folder.glob(f"{index:06d}-*.npz"):
        if path.stem.partition("-")[2] == file_digest(path):
            return path
        path.unlink()
    return None


def write_shard(task: ShardTask) -> int:
    """Encodes the documents of a shard and stores them; returns the shard's number.

    The file appears complete or not at all. It holds, for each split, `SPLIT` (ids with the separator before each document)
    and `SPLIT_lengths` (ids of each document, with its separator).

    Raises:
        InputError: a document changed since the survey.
    """
    arrays: dict[str, np.ndarray] = {}
    encoded = list(_encode_documents(task))
    for name, code in _CODES.items():
        chosen = [ids for split, ids in encoded if split == code]
        arrays[name] = np.concatenate(chosen) if chosen else np.zeros(0, task.dtype)
        arrays[f"{name}_lengths"] = np.array([len(ids) for ids in chosen], np.int64)
    temporary = task.folder / f"{task.index:06d}.{os.getpid()}.part"
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    temporary.rename(task.folder / f"{task.index:06d}-{file_digest(temporary)}.npz")
    return task.index


def _encode_documents(task: ShardTask) -> Iterator[tuple[int, np.ndarray]]:
    """Split and ids of each kept document, in order."""
    tokenizer = _tokenizer(task.tokenizer)
    texts: list[str] = []
    splits: list[int] = []
    size = 0
    for document, split, digest in zip(task.part.documents(), task.splits.tolist(), task.digests.tolist(), strict=True):
        if list(content_digest(document.content)) != digest:
            raise InputError(document.name, "changed while the corpus was being prepared", "run the same command again")
        if split == DROPPED:
            continue
        texts.append(document.content.decode("utf-8"))
        splits.append(split)
        size += len(document.content)
        if size > _BATCH_BYTES:
            yield from zip(splits, _encode(tokenizer, texts, task), strict=True)
            texts, splits, size = [], [], 0
    yield from zip(splits, _encode(tokenizer, texts, task), strict=True)


def _encode(tokenizer: Tokenizer, texts: list[str], task: ShardTask) -> list[np.ndarray]:
    return [np.array([task.separator_id, *ids], dtype=task.dtype) for ids in encode(tokenizer, texts)]


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)
