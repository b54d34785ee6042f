"""`megascale plan`: a plan as text and JSON, a config that starts, the errors on published runs; bad input ends with code 2."""

from __future__ import annotations

import json
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
