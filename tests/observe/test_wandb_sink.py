"""The W&B mirror, with the real client: complete when offline, harmless when the server is away, free of secrets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megascale.config.schema import Wandb
from megascale.observe import wandb_sink
from megascale.observe.wandb_sink import logged_in, open_wandb, run_identifier

CANARY = "canary0123456789canary0123456789canary01"
PROGRAM = """
import json, sys, time
from pathlib import Path
from megascale.config.schema import Wandb
from megascale.observe.wandb_sink import open_wandb

settings = json.loads(sys.argv[2])
started = time.monotonic()
config = {"model": {"streams": {"prefix_tokens": 48}}, "hf_token": sys.argv[3]}
sink = open_wandb(Wandb(**settings, tags=("a", "b"), group="g"), Path(sys.argv[1]), "name", config, lineage=2)
opened = time.monotonic() - started
for step in range(1, 21):
    loss = float("nan") if step == 3 else 1 / step
    sink.write({"step": step, "tokens": 100 * step, "train/lm_loss": loss, "flops_total": 10**25 * step})
written = time.monotonic() - started
sink.close()
print(json.dumps({"opened": opened, "written": written, "closed": time.monotonic() - started}))
"""


def clean_environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {"NETRC": "/nonexistent", "MY_SECRET": CANARY} | extra


def mirror(folder: Path, settings: dict[str, Any], **environment: str) -> tuple[dict[str, float], str, float]:
    """Runs a short program with the mirror; returns its times, its stderr and how long the whole process lived."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), json.dumps(settings), CANARY],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    (line,) = done.stdout.splitlines()
    return json.loads(line), done.stderr, time.monotonic() - started


def offline_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the offline run, read back with W&B's own reader."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment()).stdout.splitlines()
    return [json.loads(line) for line in lines]


def assert_complete(records: list[dict[str, Any]]) -> None:
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [h["step"] for h in history] == list(range(1, 21))
    assert [h["_step"] for h in history] == list(range(20))
    assert all(h["lineage"] == 2 and h["tokens"] == 100 * h["step"] for h in history)
    assert history[4]["train/lm_loss"] == 0.2
    assert history[2]["train/lm_loss"] == "NaN"
    assert history[0]["flops_total"] == 1e25


def assert_no_canary(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_offline_run_holds_every_record_and_no_secret(tmp_path: Path) -> None:
    times, stderr, _ = mirror(tmp_path, {"mode": "auto"})
    assert times["written"] < 1
    assert stderr == ""
    records = offline_records(tmp_path)
    assert_complete(records)
    (run,) = [r["run"] for r in records if r["type"] == "run"]
    assert run["run_id"] == (tmp_path / "wandb_id").read_text().strip()
    assert (run["display_name"], run["project"], run["run_group"], run["tags"]) == ("name", "megascale", "g", ["a", "b"])
    assert run["config"]["update"]["model"] == {"streams": {"prefix_tokens": 48}}
    assert run["config"]["update"]["hf_token"] == "[redacted]"
    (metric,) = [r["metric"] for r in records if r["type"] == "metric"]
    assert (metric["glob_name"], metric["step_metric"]) == ("*", "tokens")
    assert_no_canary(tmp_path)


@pytest.mark.parametrize("server", ["closed_port", "silent_port"])
def test_a_server_that_is_away_costs_one_line_and_no_training_time(
    tmp_path: Path, server: str, request: pytest.FixtureRequest
) -> None:
    address = f"http://127.0.0.1:{request.getfixturevalue(server)}"
    times, stderr, whole = mirror(
        tmp_path, {"mode": "auto", "timeout_seconds": 2.0}, WANDB_API_KEY=CANARY, WANDB_BASE_URL=address
    )
    assert times["written"] < 1
    assert whole < 20
    assert len(stderr.splitlines()) == 1
    assert "recording offline" in stderr
    assert_complete(offline_records(tmp_path))
    assert_no_canary(tmp_path)


def test_online_without_a_login_records_offline_and_asks_nothing(tmp_path: Path) -> None:
    _, stderr, _ = mirror(tmp_path, {"mode": "online"})
    assert stderr.splitlines() == ["wandb: not logged in (WANDB_API_KEY or `wandb login`); recording offline"]
    assert_complete(offline_records(tmp_path))


def test_off_starts_nothing(tmp_path: Path) -> None:
    assert open_wandb(Wandb(mode="off"), tmp_path, "name", {}, 1) is None
    assert list(tmp_path.iterdir()) == []


def test_the_run_keeps_its_identifier(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").touch()  # a start killed while it wrote the file
    first = run_identifier(tmp_path)
    assert run_identifier(tmp_path) == first
    assert len(first) == 8


def test_login_is_a_key_in_the_environment_or_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(path))
    assert not logged_in()
    path.write_text("machine api.wandb.ai login user password x\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert logged_in()


class BrokenRun:
    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, record: dict) -> None:
        raise BrokenPipeError("service died\nsecond line")


def test_a_failure_while_training_is_said_once_and_never_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(wandb_sink.WandbSink, "_start", lambda self: BrokenRun())
    sink = open_wandb(Wandb(), tmp_path, "name", {}, 1, said.append)
    assert sink is not None
    for step in range(100):
        sink.write({"step": step})
        time.sleep(0.001)
    sink.close()
    assert said == ["mirror ended (service died); training and metrics.jsonl go on"]


def test_a_stuck_client_neither_fills_memory_nor_holds_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    stuck = threading.Event()
    monkeypatch.setattr(wandb_sink, "_QUEUE_RECORDS", 10)
    monkeypatch.setattr(wandb_sink, "_OFFLINE_SECONDS", 0.1)
    monkeypatch.setattr(wandb_sink.WandbSink, "_start", lambda self: stuck.wait())
    sink = open_wandb(Wandb(timeout_seconds=0.1), tmp_path, "name", {}, 1, said.append)
    assert sink is not None
    started = time.monotonic()
    for step in range(50):
        sink.write({"step": step})
    sink.close()
    assert time.monotonic() - started < 2
    assert len(said) == 1
    assert "10 records are waiting" in said[0]
    stuck.set()
