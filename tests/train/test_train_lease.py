"""A run folder belongs to one job: a second one waits, is refused, or takes it from a dead one, which never writes there again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread

import pytest

from megascale.checkpoint.folders import list_checkpoints
from megascale.config.errors import InputError
from megascale.train import lease
from megascale.train.lease import NAME, Holder, LeaseLost, take
from megascale.train.stopping import StopRequest
from runs import Run, start_pretrain, tiny_config, write_config

ELSEWHERE = {"host": "node7", "machine": "another boot", "process": 12345}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "DEAD_SECONDS", 0.6)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0.0)


@pytest.fixture
def said() -> list[str]:
    return []


def hold_as(folder: Path, **facts: object) -> Path:
    """The file of another holder."""
    (folder / NAME).write_text(json.dumps(asdict(replace(Holder.this_process(), **facts))))
    return folder / NAME


@pytest.fixture
def signs_of_life(tmp_path: Path) -> Iterator[None]:
    """A holder elsewhere that renews its file."""
    path, ending = hold_as(tmp_path, **ELSEWHERE), Event()

    def renew() -> None:
        while not ending.wait(0.1):
            os.utime(path)

    thread = Thread(target=renew)
    thread.start()
    yield
    ending.set()
    thread.join()


def test_a_folder_is_held_and_left_without_a_trace(tmp_path: Path, said: list[str]) -> None:
    held = take(tmp_path, said.append)
    assert os.listdir(tmp_path) == [NAME] and not held.is_lost()
    held.release()
    assert os.listdir(tmp_path) == [] and said == []


def test_a_holder_on_this_machine_that_lives_is_named(tmp_path: Path, said: list[str]) -> None:
    held = take(tmp_path, said.append)
    with pytest.raises(InputError) as caught:
        take(tmp_path, said.append)
    assert f"is being trained by process {os.getpid()} on " in str(caught.value) and "STOP" in str(caught.value)
    assert len(said) == 1 and "waiting" in said[0]
    assert not held.is_lost()
    held.release()


def test_a_process_that_was_killed_is_replaced_at_once(tmp_path: Path, said: list[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    hold_as(tmp_path, process=process.pid, started=time.time())
    process.kill()
    process.communicate()
    started = time.monotonic()
    take(tmp_path, said.append).release()
    assert time.monotonic() - started < lease.DEAD_SECONDS
    assert len(said) == 1 and f"over from process {process.pid}" in said[0]


def test_another_process_of_the_same_number_does_not_count(tmp_path: Path, said: list[str]) -> None:
    hold_as(tmp_path, started=1e9)
    take(tmp_path, said.append).release()
    assert len(said) == 1 and "over from" in said[0]


def test_a_holder_elsewhere_without_a_sign_of_life_is_replaced(tmp_path: Path, said: list[str]) -> None:
    hold_as(tmp_path, **ELSEWHERE)
    take(tmp_path, said.append).release()
    assert ["waiting" in line for line in said] == [True, False] and "process 12345 on node7" in said[1]


@pytest.mark.usefixtures("signs_of_life")
def test_a_holder_elsewhere_that_lives_is_named(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(InputError, match="process 12345 on node7"):
        take(tmp_path, said.append)


def test_a_holder_that_ends_is_waited_for(tmp_path: Path, said: list[str]) -> None:
    held = take(tmp_path, said.append)
    thread = Thread(target=lambda: (time.sleep(0.2), held.release()))
    thread.start()
    take(tmp_path, said.append).release()
    thread.join()
    assert len(said) == 1 and "waiting" in said[0]


def test_an_old_holder_sees_that_it_has_lost_and_leaves_the_file(tmp_path: Path, said: list[str]) -> None:
    held = take(tmp_path, said.append)
    text = hold_as(tmp_path, **ELSEWHERE).read_text()
    time.sleep(0.2)
    assert held.is_lost()
    held.release()
    assert (tmp_path / NAME).read_text() == text


def test_a_file_removed_by_hand_comes_back(tmp_path: Path, said: list[str]) -> None:
    held = take(tmp_path, said.append)
    (tmp_path / NAME).unlink()
    assert not held.is_lost() and (tmp_path / NAME).exists()
    held.release()


def test_a_damaged_file_is_replaced(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / NAME).write_text("{")
    take(tmp_path, said.append).release()
    assert "unknown host" in said[-1]


def test_a_run_that_lost_its_folder_ends_without_a_checkpoint(tmp_path: Path, tiny_corpus: Path) -> None:
    run = Run(tiny_config(tmp_path, tiny_corpus))
    run.stop.level = StopRequest.LOST
    with pytest.raises(LeaseLost, match="this job ends without a checkpoint"):
        run.train()
    assert len(run.records) == 1 and list_checkpoints(run.folder / "checkpoints") == []


@pytest.mark.slow
def test_a_running_job_that_lost_its_folder_leaves_it_alone(tmp_path: Path, tiny_corpus: Path) -> None:
    process = start_pretrain(write_config(tmp_path, tiny_corpus), "schedule.steps=100000")
    folder, deadline = tmp_path / "runs" / "tiny", time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    hold_as(folder, **ELSEWHERE)
    (folder / "exit.json").write_text("the other job's")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 2 and "was taken over by process 12345 on node7" in errors
    assert (folder / "exit.json").read_text() == "the other job's"
    assert list_checkpoints(folder / "checkpoints") == []
