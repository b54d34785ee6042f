"""Faults while a checkpoint is written: kill -9 at every step, and disks that are full."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megascale.checkpoint import save
from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.layout import full
from megascale.checkpoint.load import newest_good
from megascale.checkpoint.save import save_checkpoint

ROOT = Path(__file__).parents[2]
KILLER = Path(__file__).with_name("checkpoint_killer.py")


def python(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_alone(folder: Path, step: int, elements: int) -> Path:
    return save_checkpoint(
        folder,
        step,
        [full("w", torch.full((elements,), float(step)))],
        {"step": step},
        rank=0,
        world=1,
        gather=lambda value: [value],
        barrier=lambda: None,
    )


@pytest.mark.parametrize(
    ("scenario", "world", "allowed"),
    [
        ("first", 1, [(None, None), (100, 1.0)]),
        ("next", 2, [(100, 100.0), (200, 2.0)]),
        ("replace", 2, [(100, 100.0), (100, -100.0)]),
        ("prune", 1, [(300, 300.0)]),
    ],
)
def test_kill_at_every_step_leaves_the_old_or_the_new_checkpoint(tmp_path, scenario, world, allowed) -> None:
    kills = json.loads(python(KILLER, tmp_path, scenario, world))
    assert len(kills) > 15, "each save has this many steps at least"
    hits = {kill["hit"] for kill in kills}
    assert {"os.rename", "fsync"} <= hits
    assert scenario == "prune" or {"open", "mid write", "os.mkdir"} <= hits
    assert scenario in ("first", "next") or {"os.remove", "os.rmdir"} <= hits
    for kill in kills:
        assert "error" not in kill and kill["lines"] == [], kill
        assert (kill["step"], kill["value"]) in allowed, kill
        assert kill["after"] == 900 and all("." not in name for name in kill["left"]), kill
    found = [(kill["step"], kill["value"]) for kill in kills]
    assert set(found) == set(allowed), "kills before and after the moment that counts"
    assert found == sorted(found, key=allowed.index), "once the new one is there it stays"


def test_a_file_size_limit_is_a_full_disk(tmp_path) -> None:
    save_alone(tmp_path, 100, 1000)
    code = f"""
import resource, sys, pathlib, torch
sys.path.insert(0, {str(ROOT)!r})
from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.layout import full
from megascale.checkpoint.save import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_checkpoint(pathlib.Path({str(tmp_path)!r}), 200, [full("w", torch.zeros(1 << 20))], {{}},
                    rank=0, world=1, gather=lambda value: [value], barrier=lambda: None)
except SaveError as error:
    print(error)
"""
    printed = python("-c", code)
    for part in ("rank 0 could not write", "shard-00000.safetensors", "File too large", "needs 4,19", "bytes are free"):
        assert part in printed
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_keeps_the_old_checkpoint_and_recovers_when_space_is_freed(small_disk, monkeypatch) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (2 << 20))
    save_alone(small_disk / "checkpoints", 100, 1000)
    with pytest.raises(SaveError, match=r"disk full on .*needs 2,09\d,\d{3} bytes, 2,08\d,\d{3} bytes are free"):
        save_alone(small_disk / "checkpoints", 200, (2 << 20) // 4)

    # Another program may take the space after it was looked at.
    with monkeypatch.context() as patch:
        patch.setattr(save._Save, "_check_space", lambda self, plans: None)
        with pytest.raises(SaveError, match="shard-00000.safetensors: No space left on device"):
            save_alone(small_disk / "checkpoints", 200, (2 << 20) // 4)
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000100"]
    reader = newest_good(small_disk / "checkpoints", pytest.fail)
    assert reader is not None and reader.step == 100

    ballast.unlink()
    save_alone(small_disk / "checkpoints", 200, (2 << 20) // 4)
    reader = newest_good(small_disk / "checkpoints", pytest.fail)
    assert reader is not None and reader.step == 200
