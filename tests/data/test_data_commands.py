"""The verbs `prepare` and `data`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.commands import data, prepare
from megascale.config.errors import InputError


def run(module, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(words))


def test_prepare_prints_what_it_made(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (texts.parent / "bad.txt").write_bytes(b"\0")
    words = ("mine", "--from", str(texts), str(texts.parent / "bad.txt"), "--vocab-size", "300", "--workers", "1")
    assert run(prepare, *words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("data/mine: ")
    assert "1 bad documents\n    binary: 1 (bad.txt)" in printed
    assert run(data, "prepare", *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bad_documents"] == {"binary": 1}


@pytest.mark.parametrize(
    "words", [["--validation", "1"], ["--validation", "-0.1"], ["--workers", "0"], ["--largest-document", "0"]]
)
def test_prepare_refuses_numbers_out_of_range(words: list[str]):
    with pytest.raises(InputError, match=words[0]):
        run(prepare, "mine", *words)


def test_inspect_shows_documents_and_borders(corpus_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(data, "inspect", str(corpus_folder), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["documents"]) == 3
    pieces = shown["packed"]["documents"]
    assert len(pieces) > 1
    assert [piece["first"] for piece in pieces[1:]] == [piece["last"] + 1 for piece in pieces[:-1]]
    assert all(piece["start"].startswith("<|endoftext|>") for piece in pieces[1:])
    assert run(data, "inspect", str(corpus_folder)) == 0
    assert "packed sequence" in capsys.readouterr().out


def test_verify_names_the_damaged_file(corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(corpus_folder, tmp_path / "copy"))
    assert run(data, "verify", str(folder)) == 0
    assert "all as written" in capsys.readouterr().out
    for name in ("train.tokens", "validation.documents", "tokenizer.json", "documents.jsonl"):
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 4
        (folder / name).write_bytes(raw)
        with pytest.raises(InputError, match=f"copy/{name}: differs from its digest") as caught:
            run(data, "verify", str(folder))
        assert caught.value.exit_code == 2
        raw[len(raw) // 2] ^= 4
        (folder / name).write_bytes(raw)


def test_preparing_and_the_verbs_never_import_torch():
    program = "import sys; import megascale.commands.data, megascale.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0
