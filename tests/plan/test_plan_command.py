"""`megascale plan`: a plan as text and JSON, a config that starts, the errors on published runs; bad input ends with code 2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megascale.cli import main
from megascale.config.checks import check
from megascale.config.load import load_config
from megascale.train.dry_run import dry_run
from plans import config_file


def call(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Runs `megascale plan ...`; what it printed, of a refusal the message."""
    assert main(["plan", *words]) == code
    printed = capsys.readouterr()
    return printed.err if code == 2 else printed.out


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--config", str(config_file(folder)), "--cluster", "h100", "--gpus", "16", *more]


def test_a_plan_says_what_binds_and_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = call(capsys, *arguments(tmp_path, "--tokens", "1e10"))
    for words in ("plan of planned on 16 x H100", "binds: ", "products", "1e+10 tokens: ", "GPU hours, $", "goodput"):
        assert words in text


def test_the_plan_as_json_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(call(capsys, *arguments(tmp_path, "--tokens", "1e10", "--top", "3", "--json")))
    assert len(facts["layouts"]) == 3
    for one in facts["layouts"]:
        assert sum(one["time"].values()) == pytest.approx(one["step_seconds"])
        days = 1e10 / facts["step"]["tokens"] * one["step_seconds"] / 86400
        assert one["cost"]["days"] * one["cost"]["goodput"]["share"] == pytest.approx(days)
        assert one["cost"]["price"] == pytest.approx(one["cost"]["gpu_hours"] * 2.5)


def test_the_written_config_is_what_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It passes the checks of a start on 16 ranks, has the steps that the tokens ask for, and a dry run finds the planned memory."""
    out, job = tmp_path / "best.yaml", tmp_path / "best.sbatch"
    more = ("--tokens", "1e9", "--top", "1", "--json", "--write", str(out), "--slurm", str(job))
    (best,) = json.loads(call(capsys, *arguments(tmp_path, *more)))["layouts"]
    loaded = load_config(out)
    check(loaded, 16)
    assert loaded.config.schedule.steps == -(-(10**9) // (64 * 4096))
    found = dry_run(out, (), 16)
    assert max(rank.memory.activations for rank in found.ranks) == pytest.approx(best["memory"]["activations"], rel=0.1)
    assert "--nodes=2" in job.read_text()


def test_days_and_flops_sum_the_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = "schedule={phases: [{steps: 900, streams: 1, shape: constant}, {steps: 100}]}"
    given = arguments(tmp_path, "model.streams={count: 4}", phases, "--top", "1")
    facts = json.loads(call(capsys, *given, "--json"))
    (best,) = facts["layouts"]
    first, last = best["parts"]
    assert (first["steps"], first["streams"], last["steps"], last["streams"]) == (900, 1, 100, 4)
    assert facts["training"]["flops"] == pytest.approx(900 * first["flops"] + 100 * last["flops"])
    assert facts["training"]["tokens"] == 1000 * 64 * 4096
    seconds = 900 * first["step_seconds"] + 100 * last["step_seconds"]
    assert best["cost"]["days"] * best["cost"]["goodput"]["share"] * 86400 == pytest.approx(seconds)
    text = call(capsys, *given)
    for part in best["parts"]:
        assert f"{part['step_seconds']:.3f}" in text.split("its steps")[1]


RAMP = "batch.ramp=[{steps: 50, sequences: 16}]"


def test_tokens_count_the_ramp_of_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps of the ramp take their own time: as many micro-batches of fewer sequences."""
    given = arguments(tmp_path, "schedule={steps: 100, warmup_steps: 0}", RAMP, "--top", "1", "--json")
    facts = json.loads(call(capsys, *given))
    assert facts["training"]["tokens"] == 50 * (16 + 64) * 4096
    parts = facts["layouts"][0]["parts"]
    assert [(part["steps"], part["tokens"]) for part in parts] == [(50, 16 * 4096), (50, 64 * 4096)]
    assert parts[0]["step_seconds"] < parts[1]["step_seconds"]


def test_the_written_steps_train_on_the_tokens_with_the_ramp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.yaml"
    call(capsys, *arguments(tmp_path, RAMP, "--tokens", str(4096 * (50 * 16 + 200 * 64)), "--top", "1", "--write", str(out)))
    assert load_config(out).config.schedule.steps == 250


@pytest.mark.parametrize("decay", ["50", "null"])
def test_a_shorter_schedule_keeps_warm_up_and_decay_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decay: str
) -> None:
    out, schedule = tmp_path / "out.yaml", f"schedule={{steps: 1000, shape: wsd, decay_steps: {decay}}}"
    assert main(["plan", *arguments(tmp_path, schedule, "--tokens", "3e5", "--write", str(out))]) == 0
    loaded = load_config(out)
    check(loaded, 16)
    assert loaded.config.schedule.steps == 2 and loaded.config.schedule.warmup_steps == 1
    assert "schedule.warmup_steps 100 becomes 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((RAMP, "--tokens", "3e6"), "batch.ramp"),
        (("profile.steps=[900, 901]", "--tokens", "1e8"), "profile.steps"),
        (("--gpus", "12", "batch.sequences=48", "--slurm", "JOB"), "--slurm: 12 GPUs do not fill nodes of 8"),
        (("schedule={phases: [{steps: 9}]}", "--tokens", "1e8"), "--tokens: the run's phases fix its steps"),
    ],
)
def test_a_run_that_could_not_start_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    out, job = tmp_path / "out.yaml", tmp_path / "job.sbatch"
    given = [str(job) if word == "JOB" else word for word in words]
    said = call(capsys, *arguments(tmp_path, *given, "--write", str(out)), code=2)
    assert message in said and "out.yaml" not in said
    assert not out.exists() and not job.exists()


def test_a_cluster_that_always_fails_never_finishes_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "fragile.yaml"
    text = Path("configs/clusters/h100.yaml").read_text()
    cluster.write_text(re.sub(r"hours_between_failures: \S+", "hours_between_failures: 0.001", text))
    given = arguments(tmp_path, "--cluster", str(cluster), "--top", "1")
    assert "the run never finishes: a failure every 0.0005 h" in call(capsys, *given)
    spent = json.loads(call(capsys, *given, "--json"))["layouts"][0]["cost"]
    assert (spent["days"], spent["gpu_hours"], spent["price"]) == (None, None, None)
    assert " never" in call(capsys, "scaling", *given[:-2])


def test_the_errors_on_published_runs_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(call(capsys, "--check", "--json"))
    assert len(facts["rows"]) == 58
    text = call(capsys, "--check")
    assert "SC21 table 1" in text
    assert "rows that judge: median" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cluster", "h100", "--gpus", "8"), "--config: is missing"),
        (("--check", "--gpus", "8"), "--check: has no use for --gpus"),
        (("--check", "--imbalance", "3", "--top", "2"), "--check: has no use for --top, --imbalance"),
        (("--gpus", "0"), "--gpus: 0 is too small"),
        (("--imbalance", "0.5"), "--imbalance: 0.5 is too small"),
        (("--tokens", "-1"), "--tokens: -1.0 is no number of tokens"),
        (("--cluster", "tpu"), "cluster tpu: is neither a known cluster"),
        (("--slurm", "job.sbatch"), "--slurm: the job script starts a config file"),
        (("precision=fp32",), "precision: fp32 has another peak"),
        (("--gpus", "131"), "no layout works: 64 sequences a step"),
        (("model.width=65536", "model.heads=512", "model.layers=200"), "layouts fits"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    given = list(words) if words[0] in ("--check", "--cluster") and "tpu" not in words else arguments(tmp_path, *words)
    assert message in call(capsys, *given, code=2)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = call(capsys, *arguments(tmp_path, "--write", str(tmp_path / "missing" / "x.yaml")), code=2)
    assert "--write: " in message
    assert "cannot be written" in message
