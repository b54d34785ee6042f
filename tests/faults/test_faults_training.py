"""Runs that are killed, stopped or started with bad input, through the real command."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megascale.checkpoint.load import CheckpointReader
from megascale.cli import main
from megascale.observe.metrics import reproducible
from megascale.observe.sinks import read_metrics
from runs import ALL_AXES, ROOT, environment, pretrain, start_pretrain, write_config

STEPS = 60
RUN = (f"schedule.steps={STEPS}", "checkpoint.every=5", "validation.every=20", "validation.sequences=4", *ALL_AXES)


def final_state(run: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """All tensors of the last checkpoint, and the metrics without times."""
    reader = CheckpointReader(run / "checkpoints" / f"step-{STEPS:08d}")
    reader.verify()
    return {name: reader.read(name) for name in reader.names()}, [reproducible(r) for r in read_metrics(run / "metrics.jsonl")]


def assert_equal_runs(found: Path, expected: Path) -> None:
    tensors, metrics = final_state(found)
    true_tensors, true_metrics = final_state(expected)
    assert tensors.keys() == true_tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, true_tensors[name])] == []
    assert metrics == true_metrics


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = pretrain(write_config(folder, tiny_corpus), *RUN)
    assert done.returncode == 0, done.stderr
    exit_record = json.loads((folder / "runs" / "tiny" / "exit.json").read_text())
    assert (exit_record["reason"], exit_record["code"]) == ("done", 0)
    return folder / "runs" / "tiny"


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has written the metrics of this step."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)


def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, tiny_corpus: Path, uninterrupted: Path
) -> None:
    config, run, moments = write_config(tmp_path, tiny_corpus), tmp_path / "runs" / "tiny", random.Random(0)
    for lines in (moments.randint(6, 14), moments.randint(22, 34)):
        process = start_pretrain(config, *RUN)
        wait_for_step(run, lines, process)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert json.loads((run / "exit.json").read_text())["reason"] == "error"
    resumed = pretrain(config, *RUN)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step-000000" in resumed.stderr
    assert_equal_runs(run, uninterrupted)


def test_asked_to_end_a_run_saves_its_step_and_goes_on_from_there(tmp_path: Path, tiny_corpus: Path, uninterrupted: Path) -> None:
    config, run = write_config(tmp_path, tiny_corpus), tmp_path / "runs" / "tiny"
    process = start_pretrain(config, *RUN)
    wait_for_step(run, 7, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    record = json.loads((run / "exit.json").read_text())
    assert (process.returncode, record["reason"], record["code"]) == (85, "requeue", 85), errors
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl")]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == f"step-{steps[-1]:08d}"
    resumed = pretrain(config, *RUN)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from step-{steps[-1]:08d}" in resumed.stderr
    assert_equal_runs(run, uninterrupted)


def test_a_stop_file_ends_a_run_and_keeps_it_from_starting(tmp_path: Path, tiny_corpus: Path) -> None:
    config, run = write_config(tmp_path, tiny_corpus), tmp_path / "runs" / "tiny"
    process = start_pretrain(config, *RUN)
    wait_for_step(run, 3, process)
    (run / "STOP").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads((run / "exit.json").read_text())["reason"] == "stop"
    again = pretrain(config, *RUN)
    assert again.returncode == 0
    assert f"not starting: {run / 'STOP'} exists; delete it to train" in again.stderr


def test_a_requeue_file_ends_a_run_like_a_signal_and_is_gone_then(tmp_path: Path, tiny_corpus: Path) -> None:
    config, run = write_config(tmp_path, tiny_corpus), tmp_path / "runs" / "tiny"
    process = start_pretrain(config, *RUN)
    wait_for_step(run, 3, process)
    (run / "REQUEUE").touch()
    _, errors = process.communicate(timeout=60)
    record = json.loads((run / "exit.json").read_text())
    assert (process.returncode, record["reason"], record["message"]) == (85, "requeue", "REQUEUE file"), errors
    assert (run / "checkpoints" / f"step-{int(record['step']):08d}").is_dir()
    assert not (run / "REQUEUE").exists()


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(config: Path, *overrides: str) -> str:
    """What a user sees: exit code 2, one message, no traceback, no run."""
    done = pretrain(config, *overrides)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stdout == ""
    return done.stderr


BAD_SETTINGS = {
    "an unknown key": ("model.heds=4", ["model.heds", "did you mean model.heads"]),
    "a spelling of another project": ("model.hidden_size=64", ["model.hidden_size", "model.width"]),
    "a wrong type": ("model.width=wide", ["model.width", 'given "wide"; expected an integer']),
    "a negative size": ("model.layers=-2", ["model.layers", "-2"]),
    "an impossible size": ("model.width=100000000", ["model.width", "parameters are more than"]),
    "heads that do not divide": ("model.heads=5", ["heads", "multiple"]),
    "a setting without effect": ("model.altup.read=predicted", ["model.altup.read", "has no effect: model.altup.blocks is 1"]),
    "more experts per token than experts": ("model.experts={count: 2, per_token: 3}", ["cannot go to 3 of 2 experts"]),
    "experts of an odd width": ("model.experts={count: 4, width: 18}", ["18 is not a multiple of 4", "the next is 20"]),
    "a longer warm-up than the run": ("schedule.warmup_steps=90", ["warmup_steps 90 is more than steps 6"]),
    "an uneven batch": ("batch.micro_batches=3", ["4 sequences / 3 micro-batches", "the nearest that works is 3 or 6"]),
    "a missing corpus": ("data.sources=[{path: nowhere}]", ["nowhere: there is no such corpus", "megascale prepare"]),
    "a small vocabulary": ("model.vocab_size=50", ["model.vocab_size: 50 is less than the tokenizer's"]),
    "context ranks that share no heads": ("parallel={cp: 3, context: ulysses}", ["parallel.cp: cp 3", "key/value heads"]),
    "a malformed override": ("model.width", ["model.width"]),
}


@pytest.mark.parametrize("override, expected", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str], override: str, expected: list[str]
) -> None:
    """In this process, by the function behind the command: a start takes seconds."""
    assert main(["train", "--config", str(write_config(tmp_path, tiny_corpus)), override]) == 2
    message = capsys.readouterr().err
    assert [text for text in expected if text not in message] == [], message
    assert message.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def test_an_unknown_key_by_the_real_command(tmp_path: Path, tiny_corpus: Path) -> None:
    assert "did you mean model.heads" in refused(write_config(tmp_path, tiny_corpus), "model.heds=4")


def test_a_pattern_without_a_match_binds_the_folder_to_nothing(tmp_path: Path, tiny_corpus: Path) -> None:
    config, short = write_config(tmp_path, tiny_corpus), ("schedule.steps=1", "schedule.warmup_steps=0")
    assert "'layer_0.*' matches no parameter" in refused(config, *short, "optimizer.groups=[{pattern: layer_0.*}]")
    corrected = pretrain(config, *short, "optimizer.groups=[{pattern: layers.0.*}]")
    assert corrected.returncode == 0, corrected.stderr


def test_a_missing_config(tmp_path: Path) -> None:
    assert "there is no such file" in refused(tmp_path / "none.yaml")


def test_a_truncated_token_file(tmp_path: Path, tiny_corpus: Path) -> None:
    copy = Path(shutil.copytree(tiny_corpus, tmp_path / "words"))
    tokens = copy / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-100])
    assert "train.tokens" in refused(write_config(tmp_path, copy))


def test_a_run_folder_that_cannot_be_written(tmp_path: Path, tiny_corpus: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "cannot be written: Not a directory" in refused(write_config(tmp_path, tiny_corpus))


def test_a_run_folder_of_another_config(tmp_path: Path, tiny_corpus: Path) -> None:
    config = write_config(tmp_path, tiny_corpus)
    assert pretrain(config, "schedule.steps=1", "schedule.warmup_steps=0").returncode == 0
    before = sorted(path.name for path in (tmp_path / "runs" / "tiny").rglob("*"))
    message = refused(config, "schedule.steps=1", "schedule.warmup_steps=0", "model.ffn_width=96")
    assert "model.ffn_width: 64 -> 96" in message
    assert sorted(path.name for path in (tmp_path / "runs" / "tiny").rglob("*")) == before


def test_a_batch_that_ranks_cannot_share_is_refused_by_all_of_them(tmp_path: Path, tiny_corpus: Path) -> None:
    config = write_config(tmp_path, tiny_corpus)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(ROOT / "launch" / "pretrain.py")]
    command += ["--config", str(config), "batch.sequences=3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "3 sequences / 1 micro-batches / dp 2 = 1.50 per rank, not a whole number" in done.stderr
    assert not (tmp_path / "runs").exists()
