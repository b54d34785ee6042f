"""Opening: what a run gets, and one clear error for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.config.schema import Data, Source
from megascale.data.batches import IGNORED
from megascale.data.manifest import read_manifest, write_manifest
from megascale.data.open_data import OpenData, open_data
from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest


def opened(*paths: Path, vocab_size: int | None = None, **settings) -> OpenData:
    sources = tuple(Source(path=str(path)) for path in paths)
    return open_data(Data(**{"sources": sources, "sequence_length": 32, **settings}), 1, vocab_size)


@pytest.fixture
def copy(corpus_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "small"))


def test_what_a_run_gets(corpus_folder: Path):
    data, manifest = opened(corpus_folder), read_manifest(corpus_folder)
    assert data.vocab_size == manifest.vocab_size
    assert data.token_bytes is not None
    assert data.token_bytes.dtype == np.int32
    assert data.token_bytes.shape == (data.vocab_size,)
    validation = data.validation["small"]
    batch = validation.sequences(range(len(validation)))
    assert batch.loss_tokens == manifest.splits["validation"].tokens - 1
    scored = batch.labels[batch.labels != IGNORED].numpy()
    # The text of the first document is predicted too: only its separator is not, and that has no bytes.
    assert data.token_bytes[scored].sum() == manifest.splits["validation"].bytes
    assert data.digest == opened(corpus_folder).digest


def test_a_larger_vocabulary_is_padded(corpus_folder: Path):
    data = opened(corpus_folder, vocab_size=512)
    assert data.vocab_size == 512
    assert data.token_bytes is not None
    assert data.token_bytes.shape == (512,)


def test_the_order_does_not_depend_on_where_the_corpus_lies(corpus_folder: Path, copy: Path):
    ours, theirs = opened(corpus_folder).train.sequences(range(8)), opened(copy).train.sequences(range(8))
    assert ours.tokens.tolist() == theirs.tokens.tolist()


def test_a_missing_corpus_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data/stdlib: there is no such corpus\n  -> make it: megascale prepare stdlib$"):
        opened(Path("data/stdlib"))
    with pytest.raises(InputError, match=rf"make it: megascale prepare {tmp_path}/x$"):
        opened(tmp_path / "x")


def test_a_truncated_or_missing_file_is_named(copy: Path):
    tokens = copy / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train\.tokens: the file is truncated: \d+ of \d+ bytes"):
        opened(copy)
    tokens.unlink()
    with pytest.raises(InputError, match=r"train\.tokens: the file is missing"):
        opened(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\xff\xfe"])
def test_a_damaged_manifest_is_named(copy: Path, content: str):
    (copy / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"manifest\.json: the manifest is damaged"):
        opened(copy)


def test_an_edited_or_missing_manifest_is_named(copy: Path):
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "largest_id": 5}))
    with pytest.raises(InputError, match="its digest does not fit"):
        opened(copy)
    path.unlink()
    with pytest.raises(InputError, match="the corpus has no manifest"):
        opened(copy)


def test_document_starts_must_increase(copy: Path):
    path = copy / "train.documents"
    starts = np.fromfile(path, np.int64)
    starts[[1, 2]] = starts[[2, 1]]
    starts.tofile(path)
    with pytest.raises(InputError, match=r"train\.documents: document starts are not increasing"):
        opened(copy)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(corpus_folder: Path):
    with pytest.raises(InputError, match=r"model\.vocab_size: 300 is less than the tokenizer's \d+"):
        opened(corpus_folder, vocab_size=300)


def test_ids_outside_the_vocabulary_are_refused(copy: Path):
    write_manifest(copy, read_manifest(copy).model_copy(update={"largest_id": 60000}))
    with pytest.raises(InputError, match="holds id 60000, outside the vocabulary"):
        opened(copy)


def test_mixed_tokenizers_are_refused(corpus_folder: Path, texts: Path, tmp_path: Path):
    other = tmp_path / "other"
    prepare_corpus(other, PrepareRequest(source=SourceRequest(paths=(texts,)), vocab_size=300))
    with pytest.raises(
        InputError, match=r"other: its tokenizer is not the one of .*small\n  -> prepare it again with --tokenizer"
    ):
        opened(corpus_folder, other)
    with pytest.raises(InputError, match=r"other: its tokenizer is not the one of data\.tokenizer"):
        opened(other, tokenizer=str(corpus_folder / "tokenizer.json"))
    assert opened(corpus_folder, tokenizer=str(corpus_folder / "tokenizer.json")).tokenizer is not None


def test_sources_with_one_name_are_told_apart(corpus_folder: Path, copy: Path):
    assert set(opened(corpus_folder, copy).validation) == {str(corpus_folder), str(copy)}
    with pytest.raises(InputError, match="listed twice"):
        opened(copy, copy)


def test_too_few_tokens_for_one_sequence_are_refused(corpus_folder: Path):
    tokens = read_manifest(corpus_folder).splits["train"].tokens
    assert len(opened(corpus_folder, sequence_length=tokens - 1).train.sources[0].sequences) == 1
    with pytest.raises(InputError, match=rf"{tokens} training tokens do not fill one sequence of {tokens}"):
        opened(corpus_folder, sequence_length=tokens)


def test_without_a_tokenizer_the_vocabulary_must_be_given(tmp_path: Path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"pair.{suffix}").write_bytes(b"")
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "pair.idx").write_bytes(header + bytes(8))
    with pytest.raises(InputError, match=r"set model\.vocab_size or data\.tokenizer"):
        opened(tmp_path / "pair")
