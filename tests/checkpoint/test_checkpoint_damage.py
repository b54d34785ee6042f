"""A damaged checkpoint is refused by name, and the newest good one is used."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.files import FileRecord, digest_file, encode_json
from megascale.checkpoint.load import CheckpointReader, newest_good, open_newest
from megascale.checkpoint.manifest import Manifest, read_manifest

FILES = ["shard-00000.safetensors", "shard-00001.safetensors", "index.json", "state.json", "manifest.json"]


def flip(path: Path, offset: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def test_every_flipped_byte_is_found_and_its_file_named(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    draw = random.Random(1)
    places = [(file, offset) for file in FILES for offset in range((path / file).stat().st_size)]
    found = 0
    for file, offset in draw.sample(places, 50):
        mask = draw.randrange(1, 256)
        flip(path / file, offset, mask)
        with pytest.raises(CheckpointError, match=file):
            CheckpointReader(path).verify()
        found += 1
        flip(path / file, offset, mask)
    assert found == 50
    CheckpointReader(path).verify()


def test_every_byte_of_the_manifest_is_protected(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    for offset in range((path / "manifest.json").stat().st_size):
        for mask in (0x01, 0x20, 0x2A):  # 0x2A turns a blank into a line break: the same JSON
            flip(path / "manifest.json", offset, mask)
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                CheckpointReader(path)
            flip(path / "manifest.json", offset, mask)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, zero, Path.unlink])
def test_the_previous_good_checkpoint_is_used_and_the_damage_reported(small_checkpoint, tmp_path, file, damage) -> None:
    small_checkpoint(tmp_path, 100)
    damage(small_checkpoint(tmp_path, 200) / file)
    lines: list[str] = []
    reader = newest_good(tmp_path, lines.append)
    assert reader is not None and reader.step == 100
    assert torch.equal(reader.read("model/weight"), torch.full((8, 8), 100.0))
    assert len(lines) == 1 and "step-00000200" in lines[0] and file in lines[0]


def test_without_any_good_checkpoint_training_does_not_silently_start_anew(small_checkpoint, tmp_path) -> None:
    assert newest_good(tmp_path / "nowhere", pytest.fail) is None
    assert newest_good(tmp_path, pytest.fail) is None
    zero(small_checkpoint(tmp_path, 100) / "index.json")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is good"):
        newest_good(tmp_path, lambda line: None)


def test_all_ranks_open_what_rank_0_chose(run_world, small_checkpoint, tmp_path) -> None:
    def open_on(self) -> object:
        lines: list[str] = []
        reader = open_newest(tmp_path, self.rank, self.broadcast, lines.append)
        return (reader and reader.step, len(lines))

    assert run_world(3, open_on) == [(None, 0)] * 3
    small_checkpoint(tmp_path, 100)
    newest = small_checkpoint(tmp_path, 200)
    truncate(newest / "shard-00001.safetensors")
    assert run_world(3, open_on) == [(100, 1), (100, 0), (100, 0)]
    shutil.rmtree(tmp_path / "step-00000100")
    assert {type(one) for one in run_world(3, open_on)} == {CheckpointError}


def test_a_renamed_checkpoint_is_refused_but_a_copy_under_another_name_is_not(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    shutil.copytree(path, tmp_path / "best")
    assert CheckpointReader(tmp_path / "best").step == 100
    path.rename(tmp_path / "step-00000900")
    with pytest.raises(CheckpointError, match="its manifest is of step 100"):
        CheckpointReader(tmp_path / "step-00000900")


def forge(path: Path, **files: FileRecord) -> None:
    """A manifest that matches changed files: the digests protect against damage, not against an author."""
    manifest = read_manifest(path)
    (path / "manifest.json").write_bytes(Manifest(manifest.step, manifest.saved_at, {**manifest.files, **files}).encode())


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_an_evil_pickle_is_never_loaded(small_checkpoint, tmp_path) -> None:
    canary = tmp_path / "canary"
    evil = pickle.dumps(Payload(canary))
    path = small_checkpoint(tmp_path / "checkpoints", 100)
    for name in ("model.pt", "shard-00009.safetensors", "state.pkl", ".metadata"):
        (path / name).write_bytes(evil)
    reader = newest_good(tmp_path / "checkpoints", pytest.fail)
    assert reader is not None
    assert [tuple(reader.read(name).shape) for name in reader.names()] == [(), (8, 8)]

    (path / "shard-00000.safetensors").write_bytes(evil)
    with pytest.raises(CheckpointError, match="shard-00000"):
        CheckpointReader(path).verify()
    forge(path, **{"shard-00000.safetensors": digest_file(path / "shard-00000.safetensors")})
    reader = CheckpointReader(path)
    reader.verify()
    with pytest.raises(CheckpointError, match="shard-00000.*cannot be read"):
        reader.read("count")
    assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists(), "the payload works, had it been loaded"


def test_a_shard_that_holds_another_shape_than_the_index_says_is_refused(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    file = path / "shard-00001.safetensors"
    save_file({"model/weight[4:8,0:8]": torch.zeros(1, 8)}, file)  # would broadcast
    forge(path, **{file.name: digest_file(file)})
    with pytest.raises(CheckpointError, match="the index says"):
        CheckpointReader(path).read("model/weight")


def test_a_manifest_cannot_point_outside_its_folder(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    forge(path, **{"../../secret": FileRecord(1, "0" * 32)})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        CheckpointReader(path)


def test_an_index_that_names_an_unlisted_file_is_refused(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 100)
    text = (path / "index.json").read_text().replace("shard-00000", "../shard-00000")
    (path / "index.json").write_text(text)
    forge(path, **{"index.json": digest_file(path / "index.json")})
    with pytest.raises(CheckpointError, match="not listed in the manifest"):
        CheckpointReader(path).read("count")


def test_a_newer_format_is_refused_with_the_versions(small_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("megascale.checkpoint.manifest.FORMAT", 2)
    path = small_checkpoint(tmp_path, 100)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; this program reads format 1"):
        CheckpointReader(path)


def test_json_is_stored_in_one_way_only() -> None:
    assert encode_json({"b": 1, "a": [2]}) == encode_json({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_json({"loss": float("nan")})
