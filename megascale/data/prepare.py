"""Preparing a corpus: documents in, one digested folder out; parallel, restartable, bit-identical each time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from megascale.config.errors import InputError
from megascale.data.assemble import assemble
from megascale.data.digests import value_digest
from megascale.data.documents import DocumentSource
from megascale.data.manifest import Dtype, Manifest, read_manifest
from megascale.data.shards import ShardTask, shard_path, write_shard
from megascale.data.sources import SourceRequest, open_source
from megascale.data.survey import TRAIN, Survey, shard_bounds, survey
from megascale.data.tokenizer import (
    PATTERN,
    load_tokenizer,
    separator_id,
    tokenizer_digest,
    train_tokenizer,
    vocabulary_size,
)
from megascale.data.workers import Workers

_FORMAT_VERSION = 1
_TOKENIZER_TRAINING_BYTES = 256 << 20


@dataclass(frozen=True)
class PrepareRequest:
    """How to make a corpus.

    Attributes:
        source: which documents.
        tokenizer: a tokenizer.json to use; None: train one on the training documents.
        vocab_size: ids of the tokenizer that is trained.
        separator: token before each document, for a given tokenizer; None: its end-of-text token.
        validation: share of the documents held out.
        workers: processes; does not change the result.
        shard_bytes: text in a unit of work, bytes; does not change the result.
    """

    source: SourceRequest = field(default_factory=SourceRequest)
    tokenizer: Path | None = None
    vocab_size: int = 4096
    separator: str | None = None
    validation: float = 0.05
    workers: int = 1
    shard_bytes: int = 4 << 20


def prepare_corpus(folder: Path, request: PrepareRequest) -> Manifest:
    """Makes the corpus folder, which appears complete or not at all; a second run with equal input changes nothing.

    Work in progress is kept beside it, in ``FOLDER.preparing``; after a kill the same command goes on from there.

    Raises:
        InputError: bad sources or tokenizer, a folder that holds something else, a second process at work.
    """
    if request.separator is not None and request.tokenizer is None:
        raise InputError("--separator", "a trained tokenizer has its own separator", "leave it out, or give --tokenizer")
    source = open_source(request.source)
    with _work_folder(folder) as work, Workers(request.workers) as workers:
        found = survey(source, request.validation, workers)
        recipe = _recipe(request, source, found)
        if folder.exists():
            manifest = _existing(folder, recipe)
            shutil.rmtree(work)
            return manifest
        _keep_only_matching(work, value_digest([recipe, request.shard_bytes]))
        tokenizer = _tokenizer(work, request, source, found)
        separator = separator_id(tokenizer, request.separator)
        dtype: Dtype = "uint16" if vocabulary_size(tokenizer) <= 1 << 16 else "uint32"
        shards = _write_shards(work, request, source, found, separator, dtype, workers)
        assemble(work / "corpus", work / "tokenizer.json", shards, source, found, separator, dtype, recipe)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work / "corpus", folder)
        _flush(folder.parent)
        shutil.rmtree(work)
    return read_manifest(folder)


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """The folder for work in progress, held by this process alone."""
    work = folder.with_name(folder.name + ".preparing")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                str(work), "another process is preparing this corpus", "wait for it, or choose another name"
            ) from error
        try:
            yield work
        finally:
            # Nothing but the lock: refused before any work was done.
            if work.exists() and [path.name for path in work.iterdir()] == ["lock"]:
                shutil.rmtree(work)


def _recipe(request: PrepareRequest, source: DocumentSource, found: Survey) -> str:
    """Digest of everything the corpus depends on."""
    if request.tokenizer is None:
        tokenizer: object = {"train": request.vocab_size, "pattern": PATTERN}
    else:
        load_tokenizer(request.tokenizer)
        tokenizer = {"given": tokenizer_digest(request.tokenizer), "separator": request.separator}
    return value_digest([_FORMAT_VERSION, source.description, found.digest(), tokenizer])


def _existing(folder: Path, recipe: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.recipe != recipe:
        remedy = "choose another name, or remove the folder first"
        raise InputError(str(folder), "already holds a corpus made from other documents or settings", remedy)
    return manifest


def _keep_only_matching(work: Path, key: str) -> None:
    """Clears the work folder, unless what it holds was made for the same corpus."""
    path = work / "key.json"
    if path.exists() and path.read_text() == json.dumps(key):
        shutil.rmtree(work / "corpus", ignore_errors=True)
        return
    for other in work.iterdir():
        if other.is_dir():
            shutil.rmtree(other)
        elif other.name != "lock":
            other.unlink()
    (work / "shards").mkdir()
    _write_whole(path, json.dumps(key))


def _tokenizer(work: Path, request: PrepareRequest, source: DocumentSource, found: Survey) -> Tokenizer:
    """The tokenizer of this corpus, also stored in the work folder."""
    path = work / "tokenizer.json"
    if not path.exists():
        if request.tokenizer is not None:
            text = request.tokenizer.read_text(encoding="utf-8")
        else:
            text = train_tokenizer(_training_texts(source, found), request.vocab_size).to_str(pretty=True)
        _write_whole(path, text)
    return load_tokenizer(path)


def _training_texts(source: DocumentSource, found: Survey) -> Iterator[str]:
    """Training documents for the tokenizer; of a large corpus, evenly spaced ones."""
    every = max(1, -(-int(found.sizes[found.splits == TRAIN].sum()) // _TOKENIZER_TRAINING_BYTES))
    seen = 0
    for start, stop in shard_bounds(found.sizes, 4 << 20):
        for split, document in zip(found.splits[start:stop].tolist(), source.part(start, stop).documents(), strict=True):
            if split == TRAIN:
                if seen % every == 0:
                    yield document.content.decode("utf-8")
                seen += 1


def _write_shards(
    work: Path,
    request: PrepareRequest,
    source: DocumentSource,
    found: Survey,
    separator: int,
    dtype: Dtype,
    workers: Workers,
) -> list[Path]:
    """Writes the shards that are not there yet; paths of all, in order."""
    folder = work / "shards"
    for unfinished in folder.glob("*.part"):
        unfinished.unlink()
    bounds = list(shard_bounds(found.sizes, request.shard_bytes))
    missing = [index for index in range(len(bounds)) if shard_path(folder, index) is None]
    tasks = (
        ShardTask(
            part=source.part(*bounds[index]),
            splits=found.splits[slice(*bounds[index])],
            digests=found.digests[slice(*bounds[index])],
            tokenizer=work / "tokenizer.json",
            separator_id=separator,
            dtype=dtype,
            folder=folder,
            index=index,
        )
        for index in missing
    )
    for _ in workers.map(write_shard, tasks, len(missing), "encoding"):
        pass
    paths = [shard_path(folder, index) for index in range(len(bounds))]
    return [path for path in paths if path is not None]


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def _flush(folder: Path) -> None:
    """Makes a rename in this folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
