"""`megascale checkpoint ls | verify`."""

from __future__ import annotations

import argparse
import json

import pytest

from megascale.commands import checkpoint
from megascale.config.errors import InputError


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    checkpoint.add_arguments(parser)
    return checkpoint.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def run_folder(small_checkpoint, tmp_path):
    for step in (100, 200):
        small_checkpoint(tmp_path / "checkpoints", step)
    (tmp_path / "manifest.json").write_text("{}")  # a run folder has one too
    return tmp_path


def damage(run_folder) -> None:
    file = run_folder / "checkpoints" / "step-00000200" / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_ls_shows_step_size_tokens_and_status(run_folder, capsys) -> None:
    assert call("ls", run_folder) == 0
    header, newest, oldest = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "step"
    assert newest.split()[0] == "200" and " 200,000 " in newest and " ok" in newest
    assert oldest.split()[0] == "100"


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000200"])
def test_all_three_kinds_of_path_are_understood(run_folder, capsys, place) -> None:
    assert call("ls", run_folder / place, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == ([200] if "step" in place else [200, 100])
    assert all(row["status"] == "ok" and row["bytes"] > 0 and row["bytes_per_second"] > 0 for row in rows)


def test_a_damaged_checkpoint_is_listed_and_fails_verify(run_folder, capsys) -> None:
    damage(run_folder)
    assert call("ls", run_folder) == 0
    assert "damaged: " in capsys.readouterr().out
    with pytest.raises(InputError, match="1 of 2 checkpoints are damaged: .*step-00000200/shard-00001") as caught:
        call("verify", run_folder)
    assert caught.value.exit_code == 2
    assert call("verify", run_folder / "checkpoints" / "step-00000100") == 0


def test_quick_does_not_claim_that_bytes_are_good(run_folder, capsys) -> None:
    damage(run_folder)
    call("ls", run_folder, "--quick", "--json")
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} == {"complete"}
    (run_folder / "checkpoints" / "step-00000200" / "state.json").unlink()
    call("ls", run_folder, "--quick", "--json")
    assert "state.json is missing" in json.loads(capsys.readouterr().out)[0]["reason"]


def test_a_folder_without_a_checkpoint_is_bad_input(tmp_path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        call("ls", tmp_path)
