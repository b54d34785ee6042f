"""Preparing: what is kept, what is left out, and that the result never depends on how it was made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.data.corpus import open_corpus
from megascale.data.documents import Document
from megascale.data.manifest import read_manifest
from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest, open_source
from megascale.data.survey import split_documents
from megascale.data.tokenizer import load_tokenizer


def request(*paths: Path, **settings) -> PrepareRequest:
    source = {name: settings.pop(name) for name in ("format", "field", "largest_document") if name in settings}
    return PrepareRequest(source=SourceRequest(paths=paths, **source), **{"vocab_size": 400, "validation": 0.2, **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder: Path, split: str) -> list[str]:
    """Text of all documents of a split; each must start with the separator."""
    corpus, tokenizer = open_corpus(str(folder)), load_tokenizer(folder / "tokenizer.json")
    part = getattr(corpus, split)
    documents = [part.document(index).tolist() for index in range(len(part.starts))]
    assert all(ids[0] == 0 and 0 not in ids[1:] for ids in documents)
    return [tokenizer.decode(ids[1:], skip_special_tokens=False) for ids in documents]


def test_all_documents_are_there_once_and_in_order(texts: Path, corpus_folder: Path):
    train, validation = decoded(corpus_folder, "train"), decoded(corpus_folder, "validation")
    originals = [path.read_text() for path in sorted(texts.iterdir())]
    assert [text for text in originals if text in set(train)] == train
    assert sorted(train + validation) == sorted(originals)
    names = [json.loads(line)["name"] for line in (corpus_folder / "documents.jsonl").read_text().splitlines()]
    assert [(texts / name).read_text() for name in names] == validation
    manifest = read_manifest(corpus_folder)
    assert manifest.splits["train"].documents + manifest.splits["validation"].documents == 40
    assert manifest.splits["validation"].bytes == sum(len(text.encode()) for text in validation)
    assert manifest.largest_id < manifest.vocab_size <= 400


def test_workers_and_shards_do_not_change_a_byte(texts: Path, corpus_folder: Path, tmp_path: Path):
    prepare_corpus(tmp_path / "other", request(texts, workers=2, shard_bytes=3000))
    assert contents(tmp_path / "other") == contents(corpus_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_killed_and_started_again_it_gives_the_same_bytes(texts: Path, corpus_folder: Path, tmp_path: Path):
    folder, work = tmp_path / "killed", tmp_path / "killed.preparing"
    program = (
        "import sys; from pathlib import Path\n"
        "from megascale.data import prepare; from megascale.data.sources import SourceRequest\n"
        "request = prepare.PrepareRequest(SourceRequest((Path(sys.argv[1]),)), vocab_size=400, validation=0.2, shard_bytes=500)\n"
        "prepare.prepare_corpus(Path(sys.argv[2]), request)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(texts), str(folder)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not list(work.glob("shards/*.npz")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(child) for child in workers.read_text().split()] if workers.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{child}").exists() and "Z" not in state(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert not folder.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("shards/*.npz")}
    assert kept
    damaged = work / "shards" / sorted(kept)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    prepare_corpus(folder, request(texts, shard_bytes=500))
    assert contents(folder) == contents(corpus_folder)
    assert not work.exists()


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_finished_shards_are_used_again(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*arguments: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("megascale.data.prepare.assemble", full_disk)
        with pytest.raises(OSError, match="disk full"):
            prepare_corpus(tmp_path / "corpus", request(texts))
    with monkeypatch.context() as patch:
        patch.setattr("megascale.data.prepare.ShardTask", full_disk)
        patch.setattr("megascale.data.prepare.train_tokenizer", full_disk)
        prepare_corpus(tmp_path / "corpus", request(texts))
    assert (tmp_path / "corpus").is_dir()


def test_the_same_command_again_changes_nothing_and_another_is_refused(texts: Path, tmp_path: Path):
    folder = tmp_path / "corpus"
    first = prepare_corpus(folder, request(texts))
    inode = folder.stat().st_ino
    assert prepare_corpus(folder, request(texts)) == first
    assert folder.stat().st_ino == inode
    with pytest.raises(InputError, match="already holds a corpus made from other documents or settings"):
        prepare_corpus(folder, request(texts, vocab_size=390))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_two_at_once_are_refused(texts: Path, tmp_path: Path):
    import fcntl

    (tmp_path / "corpus.preparing").mkdir()
    with open(tmp_path / "corpus.preparing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is preparing this corpus"):
            prepare_corpus(tmp_path / "corpus", request(texts))


def test_bad_documents_are_counted_and_named(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / f"good{number}.txt").write_text(f"good text {number}")
    (source / "copy.txt").write_text("good text 3")
    (source / "binary.txt").write_bytes(b"a\0b")
    (source / "empty.txt").write_bytes(b" \n")
    (source / "latin.txt").write_bytes("é".encode("latin-1"))
    (source / "long.txt").write_text("x" * 2000)
    manifest = prepare_corpus(tmp_path / "corpus", request(source, largest_document=1000))
    assert manifest.bad_documents == {"empty": 1, "too_large": 1, "binary": 1, "encoding": 1}
    assert {bad.name: bad.problem for bad in manifest.bad_names} == {
        "binary.txt": "binary", "empty.txt": "empty", "latin.txt": "encoding", "long.txt": "too_large",
    }  # fmt: skip
    assert manifest.duplicates == 1
    assert sum(split.documents for split in manifest.splits.values()) == 8


def test_mostly_bad_documents_stop_the_run(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"\0")
    (tmp_path / "good.txt").write_text("text")
    with pytest.raises(InputError, match=r"3 of 4 documents are bad: 0\.txt \(binary\)"):
        prepare_corpus(tmp_path / "out", request(tmp_path))
    assert not (tmp_path / "out.preparing").exists()


LINES = [b'{"body": "one"}', b'{"body": "two"', b'{"text": "three"}', b'{"body": "\xe9"}', b"", b'{"body": "\\ud800"}', b"[1]"]


def test_json_lines_are_read_one_by_one(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES))
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "four\xc3\xa9"}\n')
    source = open_source(SourceRequest(paths=(tmp_path,), field="body"))
    expected = [
        Document("a.jsonl:1", b"one"),
        Document("a.jsonl:2", b"", "broken_json"),
        Document("a.jsonl:3", b"", "missing_field"),
        Document("a.jsonl:4", b"", "encoding"),
        Document("a.jsonl:5", b"", "empty"),
        Document("a.jsonl:6", b"", "encoding"),
        Document("a.jsonl:7", b"", "missing_field"),
        Document("b.jsonl:1", "fouré".encode()),
    ]
    assert len(source) == 8
    for start in range(8):
        for stop in range(start, 9):
            assert list(source.part(start, stop).documents()) == expected[start:stop]
        assert source.name(start) == expected[start].name


def test_parquet_and_hub_data_sets_come_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"body": [f"text {number} é" for number in range(20)] + [None], "other": list(range(21))})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "part.parquet")
    for asked in (
        SourceRequest(paths=(tmp_path / "set",), field="body"),
        SourceRequest(dataset=str(tmp_path / "set"), field="body"),
    ):
        source = open_source(asked)
        assert len(source) == 21
        assert [document.content.decode() for document in source.part(3, 5).documents()] == ["text 3 é", "text 4 é"]
        assert list(source.part(20, 21).documents()) == [Document("row 20", b"", "missing_field")]
    manifest = prepare_corpus(tmp_path / "out", request(tmp_path / "set", field="body", workers=2))
    assert sum(split.documents for split in manifest.splits.values()) == 20
    with pytest.raises(InputError, match="has no field 'text'; it has body, other"):
        open_source(SourceRequest(paths=(tmp_path / "set",)))
    (tmp_path / "set" / "part.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="`datasets` cannot load it"):
        open_source(SourceRequest(paths=(tmp_path / "set",)))


def test_the_format_is_found_by_suffix(tmp_path: Path):
    for name in ("a.py", "b.py", ".hidden.py", "c.txt", "d.unknown"):
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "e.py").write_text("x = 2")
    source = open_source(SourceRequest(paths=(tmp_path,)))
    assert [source.name(index) for index in range(len(source))] == [".hidden.py", "a.py", "b.py"]
    assert open_source(SourceRequest(paths=(tmp_path / "d.unknown",))).name(0) == "d.unknown"
    (tmp_path / "e.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"several formats: 3 code, 1 jsonl, 1 text"):
        open_source(SourceRequest(paths=(tmp_path,)))


def test_sources_that_are_not_there_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(SourceRequest(paths=(tmp_path / "nothing",)))
    with pytest.raises(InputError, match="no file has a known suffix"):
        open_source(SourceRequest(paths=(tmp_path,)))
    with pytest.raises(InputError, match="no files of format parquet"):
        open_source(SourceRequest(paths=(tmp_path,), format="parquet"))


def test_the_standard_library_is_the_default_source():
    source = open_source(SourceRequest())
    names = [source.name(index) for index in range(len(source))]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or os.path.isabs(name)]


def test_a_given_tokenizer_is_kept_as_it_is(texts: Path, corpus_folder: Path, tmp_path: Path):
    given = corpus_folder / "tokenizer.json"
    manifest = prepare_corpus(tmp_path / "out", request(texts, tokenizer=given))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert manifest.separator == "<|endoftext|>"
    assert (tmp_path / "out" / "train.tokens").read_bytes() == (corpus_folder / "train.tokens").read_bytes()
    with pytest.raises(InputError, match="--separator"):
        prepare_corpus(tmp_path / "other", request(texts, separator="<s>"))


def test_the_split_depends_on_the_text_alone():
    generator = np.random.default_rng(0)
    digests = generator.integers(0, 2**64, (2000, 2), np.uint64)
    splits, duplicates = split_documents(digests, np.ones(2000, bool), 0.1)
    assert duplicates == 0
    assert 150 < (splits == 2).sum() < 250
    order = generator.permutation(2000)
    assert (split_documents(digests[order], np.ones(2000, bool), 0.1)[0] == splits[order]).all()
    doubled, duplicates = split_documents(np.concatenate([digests, digests]), np.ones(4000, bool), 0.1)
    assert duplicates == 2000
    assert (doubled[:2000] == splits).all()
    assert (doubled[2000:] == 0).all()
    few, _ = split_documents(digests[:3], np.ones(3, bool), 1e-9)
    assert sorted(few.tolist()) == [1, 1, 2]


def test_nothing_left_to_train_on_is_refused(tmp_path: Path):
    (tmp_path / "one.txt").write_text("only document")
    with pytest.raises(InputError, match="no document is left to train on"):
        prepare_corpus(tmp_path / "out", request(tmp_path, validation=0.9999999))
