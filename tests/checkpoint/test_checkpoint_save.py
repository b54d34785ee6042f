"""Saving: all ranks succeed or fail alike, older checkpoints stay, and nothing counts before it is on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megascale.checkpoint import files, folders, save
from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.layout import Rectangle, full
from megascale.checkpoint.load import CheckpointReader, newest_good


def test_state_comes_back(save_world, tmp_path) -> None:
    state = {"step": 3, "tokens": 2**60, "nested": {"loss": 0.1, "list": [1, None, True]}, "text": "ü"}
    path = save_world(tmp_path, 3, [[full("w", torch.zeros(2))], []], state)[0]
    assert CheckpointReader(path).state == state
    assert sorted(file.name for file in path.iterdir()) == [
        "index.json",
        "manifest.json",
        "shard-00000.safetensors",
        "state.json",
    ]


def test_saving_a_step_again_replaces_it(small_checkpoint, save_world, tmp_path) -> None:
    small_checkpoint(tmp_path, 100, world=3)
    path = save_world(tmp_path, 100, [[full("other", torch.ones(2))]], {"tokens": 7})[0]
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000100"]
    reader = CheckpointReader(path)
    reader.verify()
    assert reader.names() == ["other"] and reader.state == {"tokens": 7}
    assert sorted(file.name for file in path.glob("shard-*")) == ["shard-00000.safetensors"]


def test_leftovers_of_killed_writers_are_ignored_and_then_collected(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    for name in (f"step-00000300.partial-{'0' * 32}", f"step-00000200.trash-{'1' * 32}"):
        (tmp_path / name).mkdir()
        for file in path.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "notes").mkdir()
    reader = newest_good(tmp_path, pytest.fail)
    assert reader is not None and reader.step == 100
    small_checkpoint(tmp_path, 400)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["notes", "step-00000100", "step-00000400"]


def test_a_full_disk_on_one_rank_stops_all_ranks_alike(small_checkpoint, save_world, tmp_path, monkeypatch) -> None:
    small_checkpoint(tmp_path, 100)
    write_all = files.write_all

    def full_for_rank_2(file, block) -> None:
        if "shard-00002" in str(file.name) and len(block) > 1000:
            write_all(file, block[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
        write_all(file, block)

    monkeypatch.setattr(files, "write_all", full_for_rank_2)
    pieces = [[Rectangle("w", (4, 1000), (rank, 0), torch.zeros(1, 1000))] for rank in range(4)]
    outcomes = save_world(tmp_path, 200, pieces)
    assert {type(one) for one in outcomes} == {SaveError}
    assert len({str(one) for one in outcomes}) == 1
    for part in ("rank 2", "shard-00002.safetensors", "No space left on device", "bytes are free", "needs 17,"):
        assert part in str(outcomes[0])
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000100"]
    CheckpointReader(tmp_path / "step-00000100").verify()

    monkeypatch.undo()
    assert save_world(tmp_path, 200, pieces) == [tmp_path / "step-00000200"] * 4


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    small_checkpoint, save_world, tmp_path, monkeypatch
) -> None:
    small_checkpoint(tmp_path, 100)

    class Usage:
        free = 5000

    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: Usage)
    monkeypatch.setattr(save.Shard, "write", lambda *_: pytest.fail("wrote"))
    # Each rank's 4000 bytes would fit; both together do not.
    outcomes = save_world(tmp_path, 200, [[full(f"w{rank}", torch.zeros(1000))] for rank in range(2)])
    assert {type(one) for one in outcomes} == {SaveError}
    assert "disk full on" in str(outcomes[1]) and "needs 8," in str(outcomes[1]) and "5,000 bytes are free" in str(outcomes[1])
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000100"]


def test_the_needed_bytes_are_those_that_get_written(save_world, tmp_path, monkeypatch) -> None:
    class Usage:
        free = 0

    pieces = [[full(f"w{rank}", torch.zeros(1000))] for rank in range(2)]
    path = save_world(tmp_path, 1, pieces)[0]
    written = sum(file.stat().st_size for file in path.iterdir())
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: Usage)
    needed = int(str(save_world(tmp_path, 2, pieces)[0]).split("needs ")[1].split(" ")[0].replace(",", ""))
    assert written - 1000 <= needed <= written + 1000


def test_a_state_that_json_cannot_hold_fails_on_all_ranks(save_world, tmp_path) -> None:
    outcomes = save_world(tmp_path, 1, [[full("w", torch.zeros(1))], []], {"rng": torch.zeros(1)})
    assert {type(one) for one in outcomes} == {SaveError}
    assert "not JSON serializable" in str(outcomes[1])
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_fails_on_all_ranks(save_world, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    outcomes = save_world(tmp_path / "file" / "checkpoints", 1, [[full("w", torch.zeros(1))], []])
    assert {type(one) for one in outcomes} == {SaveError} and "Not a directory" in str(outcomes[1])


def test_an_older_writer_that_is_still_alive_cannot_damage_the_newer_one(
    small_checkpoint, save_world, tmp_path, monkeypatch
) -> None:
    write = save.Shard.write

    def overtaken(self, folder: Path):
        monkeypatch.setattr(save.Shard, "write", write)
        small_checkpoint(tmp_path, 100)
        return write(self, folder)

    monkeypatch.setattr(save.Shard, "write", overtaken)
    assert "No such file" in str(save_world(tmp_path, 100, [[full("old", torch.zeros(1))]])[0])
    reader = newest_good(tmp_path, pytest.fail)
    assert reader is not None and reader.names() == ["count", "model/weight"]


def test_everything_is_on_the_disk_before_the_rename(small_checkpoint, tmp_path, monkeypatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(old: Path, new: Path) -> None:
        assert {str(file) for file in old.iterdir()} | {str(old)} <= set(synced)
        assert synced[-2:] == [str(old / "manifest.json"), str(old)], "the manifest comes last, then the folder"
        synced.clear()
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    small_checkpoint(tmp_path, 100, world=3)
    assert synced == [str(tmp_path)], "the rename itself is made durable"


def test_tensors_in_host_memory_are_written_without_a_copy() -> None:
    from megascale.checkpoint.shard import tensor_bytes

    tensor = torch.zeros(3, dtype=torch.bfloat16)
    view = tensor_bytes(tensor)
    tensor.fill_(1)
    assert bytes(view) == b"\x80\x3f" * 3


def test_a_write_that_the_system_cuts_short_is_continued() -> None:
    class Stingy:
        content = b""

        def write(self, block: memoryview) -> int:
            self.content += bytes(block[:3])
            return min(3, len(block))

    file = Stingy()
    files.write_all(file, memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert file.content == b"0123456789"


def test_names_of_folders_order_by_step(tmp_path) -> None:
    for name in ("step-00000009", "step-00000010", "step-123456789", "step-7", f"step-00000010.replacement-{'a' * 32}"):
        (tmp_path / name).mkdir()
    names = [path.name for path in folders.list_checkpoints(tmp_path)]
    assert names == ["step-123456789", f"step-00000010.replacement-{'a' * 32}", "step-00000010", "step-00000009"]
