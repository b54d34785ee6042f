"""Opening everything a run reads: corpora, their tokenizer, the training blend and the validation sets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megascale.config.errors import InputError
from megascale.config.schema import Data
from megascale.data.batches import SequenceSet
from megascale.data.blend import Blend, BlendedSource
from megascale.data.corpus import Corpus, open_corpus
from megascale.data.digests import value_digest
from megascale.data.manifest import prepare_command
from megascale.data.megatron import is_megatron, open_megatron
from megascale.data.tokenizer import load_tokenizer, token_bytes, tokenizer_digest, vocabulary_size


@dataclass(frozen=True)
class OpenData:
    """What a run reads.

    Attributes:
        vocab_size: rows of the embedding: model.vocab_size if it is set, else the tokenizer's size.
        tokenizer: None if no source has one.
        digest: changes with the contents of any source.
        token_bytes: bytes of text of each id, int32 [vocab_size], 0 for special and unused ids; None without a tokenizer,
            or with one that does not keep all of the text.
        train: the training sequences.
        validation: held-out sequences by source, without sources that hold nothing out.
    """

    vocab_size: int
    tokenizer: Tokenizer | None
    digest: str
    token_bytes: np.ndarray | None
    train: Blend
    validation: dict[str, SequenceSet]


def open_data(data: Data, seed: int, vocab_size: int | None) -> OpenData:
    """Opens all sources. Cheap whatever their size; `megascale data verify` reads and checks everything.

    Args:
        seed: of the sample order.
        vocab_size: model.vocab_size.

    Raises:
        InputError: a missing, damaged or too small source, tokenizers that differ, ids outside the vocabulary.
    """
    corpora = [open_source(source.path, data.validation_fraction) for source in data.sources]
    path = _tokenizer_path(data, corpora)
    tokenizer = load_tokenizer(path) if path is not None else None
    size = _vocabulary(tokenizer, vocab_size, corpora)
    names = _names(corpora)
    train = [SequenceSet(name, corpus.train, data.sequence_length, data.attention, size, False) for name, corpus in names.items()]
    for sequences in train:
        if not len(sequences):
            reason = (
                f"{sequences.split.length} training tokens do not fill one sequence of {data.sequence_length} and its last label"
            )
            raise InputError(sequences.split.place, reason, "give more documents, or lower data.sequence_length")
    validation = {
        name: SequenceSet(name, corpus.validation, data.sequence_length, data.attention, size, True)
        for name, corpus in names.items()
        if corpus.validation.length > 1
    }
    blended = [
        BlendedSource(sequences, source.weight, corpus.digest)
        for sequences, source, corpus in zip(train, data.sources, corpora, strict=True)
    ]
    return OpenData(
        vocab_size=size,
        tokenizer=tokenizer,
        digest=value_digest([corpus.digest for corpus in corpora]),
        token_bytes=token_bytes(tokenizer, size) if tokenizer is not None else None,
        train=Blend(blended, seed),
        validation=validation,
    )


def open_source(path: str, validation_fraction: float) -> Corpus:
    """Opens a prepared folder or a Megatron pair.

    Raises:
        InputError: neither is there, or it is damaged.
    """
    if Path(path).is_dir():
        return open_corpus(path)
    if is_megatron(path):
        return open_megatron(path, validation_fraction)
    raise InputError(path, "there is no such corpus", f"make it: {prepare_command(Path(path))}")


def _tokenizer_path(data: Data, corpora: list[Corpus]) -> Path | None:
    """The one tokenizer of all sources."""
    known = [corpus for corpus in corpora if corpus.tokenizer_digest is not None]
    if data.tokenizer is not None:
        path = Path(data.tokenizer)
        load_tokenizer(path)
        expected, place = tokenizer_digest(path), f"data.tokenizer: {path}"
    elif known:
        path, expected, place = known[0].tokenizer, known[0].tokenizer_digest, known[0].path  # type: ignore[assignment]
    else:
        return None
    for corpus in known:
        if corpus.tokenizer_digest != expected:
            reason = f"its tokenizer is not the one of {place}"
            raise InputError(corpus.path, reason, f"prepare it again with --tokenizer {path}")
    return path


def _vocabulary(tokenizer: Tokenizer | None, vocab_size: int | None, corpora: list[Corpus]) -> int:
    """Number of ids of the model, checked against tokenizer and corpora."""
    if tokenizer is None and vocab_size is None:
        reason = "the sources have no tokenizer, so the size of the vocabulary is not known"
        raise InputError("model.vocab_size", reason, "set model.vocab_size or data.tokenizer")
    known = vocabulary_size(tokenizer) if tokenizer is not None else 0
    size = vocab_size if vocab_size is not None else known
    if size < known:
        raise InputError(
            "model.vocab_size", f"{size} is less than the tokenizer's {known}", f"set it to {known} or more, or leave it out"
        )
    for corpus in corpora:
        if corpus.largest_id >= size:
            reason = f"holds id {corpus.largest_id}, outside the vocabulary of {size}"
            raise InputError(corpus.path, reason, "check data.tokenizer and model.vocab_size against the tokenizer that made it")
    return size


def _names(corpora: list[Corpus]) -> dict[str, Corpus]:
    """Sources by name: the last part of the path, or the whole path where that is not unique."""
    counts = Counter(corpus.name for corpus in corpora)
    names = {corpus.name if counts[corpus.name] == 1 else corpus.path: corpus for corpus in corpora}
    if len(names) < len(corpora):
        twice, _ = Counter(corpus.path for corpus in corpora).most_common(1)[0]
        raise InputError(f"data.sources: {twice}", "listed twice", "list it once, with the sum of the weights")
    return names
