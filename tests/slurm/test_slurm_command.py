"""`megascale slurm`: the script it writes, and what it refuses before anything is submitted."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.cli import main
from megascale.train.job_script import TEMPLATE, seconds_of
from runs import ROOT, write_config


@pytest.fixture
def config(tmp_path: Path, tiny_corpus: Path) -> Path:
    return write_config(tmp_path, tiny_corpus)


def write(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> tuple[int, str, str]:
    """The verb's code, the script and the messages."""
    capsys.readouterr()
    code = main(["slurm", "--config", str(config), "--nodes", "2", *arguments])
    return (code, *capsys.readouterr())


def header(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def settings(script: str) -> dict[str, str]:
    """The settings as the shell that runs the script sees them."""
    top = script.partition("# What follows is the same")[0]
    names = ("training[*]", "ranks", "max_restarts", "image", "mounts", "pretrain", "run", "PATH")
    shown = subprocess.run(
        ["bash", "-c", top + "\n" + "\n".join(f'echo "${{{name}}}"' for name in names)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(names, shown.stdout.splitlines(), strict=True))


def test_a_script_has_the_template_s_body_and_a_header_for_this_job(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    code, script, said = write(capsys, config, "--ranks-per-node=2", "--time=2-12", "--partition=long", "--sbatch=--account=a")
    assert code == 0
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert {"--nodes=2", "--time=2-12", "--partition=long", "--signal=B:USR1@600", "--requeue"} < set(header(script))
    assert header(script)[-1] == "--account=a"
    assert not any("gres" in line or "array" in line for line in header(script))
    body = TEMPLATE.read_text().partition("# What follows is the same")[2]
    assert script.endswith(body)
    assert "2 x 2 ranks: dp 4; at most" in said
    found = settings(script)
    assert (found["ranks"], found["max_restarts"], found["image"]) == ("2", "100", "")
    assert (found["run"], found["pretrain"]) == (f"{config.parent}/runs/tiny", str(ROOT / "launch" / "pretrain.py"))
    assert found["PATH"].startswith(f"{Path(sys.executable).parent}:")


def test_gpus_array_and_container_are_asked_for(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    options = ("--gpus-per-node=2", "--array=10", "--container=nvcr.io#nvidia/pytorch:26.01", "--container-mounts=/data:/data")
    _, script, _ = write(capsys, config, *options)
    assert {"--gres=gpu:2", "--array=1-10%1", "--output=%x-%A_%a.out"} < set(header(script))
    found = settings(script)
    assert (found["ranks"], found["image"], found["mounts"]) == ("2", "nvcr.io#nvidia/pytorch:26.01", "/data:/data")
    assert str(Path(sys.executable).parent) not in script, "the image has its own Python"


def test_what_a_user_gives_is_never_shell(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    folder = f"$(touch {trap})`touch {trap}`; touch {trap} '"
    _, script, _ = write(
        capsys, config, f"run.folder={tmp_path}/{folder}", f"--container=$(touch {trap})", "--sbatch=--comment=a # b"
    )
    assert '#SBATCH --comment="a # b"' in script
    found = settings(script)
    assert found["training[*]"] == f"--config {config} run.folder={tmp_path}/{folder}"
    assert found["run"] == f"{tmp_path}/{folder}/tiny"
    assert not trap.exists()
    assert shlex.split(script.partition("image=")[2].splitlines()[0]) == [f"$(touch {trap})"]


REFUSED = {
    "a layout that does not fit": (["parallel.tp=3"], "parallel.tp"),
    "no nodes": (["--nodes=0"], "--nodes: 0 is too small"),
    "no time": (["--time=soon"], "--time: soon is no time limit"),
    "a warning before the start": (["--time=10"], "--warning-seconds: 600 s before the end of 600 s"),
    "mounts without a container": (["--container-mounts=/a:/a"], "has no effect without --container"),
    "an option that is none": (["--sbatch=account=a"], "begins without -"),
    "an option of two lines": (["--sbatch=--comment=a\n#SBATCH --uid=0"], "line break"),
}


@pytest.mark.parametrize("arguments, reason", REFUSED.values(), ids=REFUSED)
def test_a_job_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    file = tmp_path / "job.sbatch"
    code, script, said = write(capsys, config, f"--output={file}", *arguments)
    assert (code, script) == (2, "")
    assert reason in said
    assert not file.exists()


@pytest.mark.parametrize(
    "time, seconds",
    [("30", 1800), ("30:15", 1815), ("2:30:15", 9015), ("1-0", 86400), ("1-12:30", 131400), ("2-0:0:1", 172801)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
