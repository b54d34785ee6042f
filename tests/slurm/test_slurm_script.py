"""launch/slurm/pretrain.sbatch, with SLURM's commands replaced by ones that play a part and write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from corpora import build_corpus
from runs import ROOT, write_config

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$STAGE/srun"
env >"$STAGE/environment"
[ -n "$WAIT" ] && until [ -e "$RUN_FOLDER/REQUEUE" ]; do sleep 0.05; done
[ -n "$CHECKPOINT" ] && mkdir -p "$RUN_FOLDER/checkpoints/$CHECKPOINT"
[ -n "$REASON" ] && printf '{\\n "reason": "%s",\\n "code": 1\\n}\\n' "$REASON" >"$RUN_FOLDER/exit.json"
exit "$CODE"
"""
NOTE = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && printf 'node1\\nnode2\\n' && exit
[ "$1 $2" = "show job" ] && echo "JobId=42 $STATE Restarts=0" && exit
echo "${0##*/} $*" >>"$STAGE/asked"
"""
ARRAY = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}


class Stage:
    """A folder with the commands, and the run folder of a run that never trains."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "runs" / "tiny"
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", NOTE), ("scancel", NOTE)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, reason: str, code: int, arguments: Sequence[str] = ("FILE", "a.b=c d"), **variables: str) -> subprocess.Popen:
        """The job, whose ranks end with this reason in exit.json (empty: no such file) and this code."""
        job = {
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_CPUS_PER_NODE": "9(x2)",
        }
        play = {"STAGE": self.folder, "REASON": reason, "CODE": code, "RUN_FOLDER": self.run, "WAIT": "", "CHECKPOINT": ""}
        environment = Path(sys.executable).parent  # megascale's, which a user has active
        path = {"PATH": f"{self.folder / 'bin'}:{environment}:{os.environ['PATH']}", "RANKS_PER_NODE": "4"}
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        every = own | job | {name: str(value) for name, value in play.items()} | path | variables
        command, pipe = ["bash", str(SCRIPT), *arguments], subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=every, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def play(self, reason: str, code: int, *arguments: str, **variables: str) -> tuple[int, str]:
        """The job to its end: its code, and what it asked of SLURM."""
        job = self.start(reason, code, arguments or ("FILE", "a.b=c d"), **variables)
        self.said, _ = job.communicate(timeout=60)
        return job.returncode, self.asked()

    def asked(self) -> str:
        file = self.folder / "asked"
        text = file.read_text().strip() if file.exists() else ""
        file.unlink(missing_ok=True)
        return text


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_ranks_start_under_deepspeed_on_every_node_with_the_arguments_as_given(stage: Stage) -> None:
    assert stage.play("done", 0) == (0, "")
    words = (stage.folder / "srun").read_text()
    assert words.startswith("--nodes=2\n--ntasks=2\n--ntasks-per-node=1\n--cpus-per-task=9\n")
    assert "exec deepspeed" in words
    assert words.endswith(f"\non_node\n{stage.run}\nlaunch/pretrain.py\n--config\nFILE\na.b=c d\n")
    assert (stage.run / "logs" / "hostfile").read_text() == "node1 slots=4\nnode2 slots=4\n"
    variables = (stage.folder / "environment").read_text().splitlines()
    assert {"MASTER_ADDR=node1", "MASTER_PORT=20420", "OMP_NUM_THREADS=2"} < set(variables)


REQUEUED = (0, "scontrol requeue 42")
ENDS = {
    "done": ("done", 0, {}, (0, "")),
    "stopped by the user": ("stop", 0, {}, (0, "")),
    "saved before the time limit": ("requeue", 85, {}, REQUEUED),
    "a crash": ("error", 1, {}, REQUEUED),
    "a host lost before the run could say anything": ("", 137, {}, REQUEUED),
    "bad input that only the run saw": ("bad_input", 2, {}, (2, "")),
    "bad input, nothing started": ("", 2, {}, (2, "")),
    "restarted too often": ("requeue", 85, {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, (1, "")),
    "in an array the next element goes on": ("requeue", 85, ARRAY, (0, "")),
    "in an array bad input ends all": ("", 2, ARRAY, (2, "scancel --state=PENDING 40")),
}


@pytest.mark.parametrize("reason, code, variables, expected", ENDS.values(), ids=ENDS)
def test_what_follows_an_end(stage: Stage, reason: str, code: int, variables: dict[str, str], expected: tuple[int, str]) -> None:
    assert stage.play(reason, code, **variables) == expected, stage.said


def test_a_job_that_ends_three_times_without_a_new_checkpoint_is_not_started_again(stage: Stage) -> None:
    for checkpoint in ("step-00000025", "", "step-00000050", ""):
        assert stage.play("error", 1, CHECKPOINT=checkpoint) == REQUEUED
    assert stage.play("error", 1) == (1, ""), stage.said
    assert "three ends without a new checkpoint" in stage.said
    assert stage.play("error", 1, SLURM_JOB_ID="43") == (0, "scontrol requeue 43")  # submitted anew: another three
    assert stage.play("error", 1, CHECKPOINT="step-00000075") == REQUEUED


@pytest.mark.parametrize("sign, said", [("exit.json", "the run is done"), ("STOP", "delete it to train")])
def test_a_run_that_is_done_or_stopped_starts_nothing(stage: Stage, sign: str, said: str) -> None:
    stage.run.mkdir(parents=True)
    (stage.run / sign).write_text('{\n "reason": "done",\n "code": 0\n}\n')
    assert stage.play("error", 1, **ARRAY) == (0, "")
    assert said in stage.said
    assert not (stage.folder / "srun").exists()


def test_what_an_earlier_start_left_decides_nothing(stage: Stage) -> None:
    stage.run.mkdir(parents=True)
    (stage.run / "exit.json").write_text('{\n "reason": "requeue",\n "code": 85\n}\n')
    (stage.run / "REQUEUE").touch()
    assert stage.play("", 2) == (2, "")
    assert not (stage.run / "REQUEUE").exists()


SIGNALS = {
    "the warning before the limit": (signal.SIGUSR1, "", REQUEUED),
    "scancel, or a requeue by others: SLURM has decided": (signal.SIGTERM, "JobState=COMPLETING Reason=None", (1, "")),
    "preemption with a grace time": (signal.SIGTERM, "JobState=RUNNING Reason=None", REQUEUED),
    "the limit itself": (signal.SIGTERM, "JobState=COMPLETING Reason=TimeLimit", REQUEUED),
}


@pytest.mark.parametrize("number, state, expected", SIGNALS.values(), ids=SIGNALS)
def test_a_signal_makes_the_run_save_and_the_job_go_on_unless_it_was_ended(
    stage: Stage, number: signal.Signals, state: str, expected: tuple[int, str]
) -> None:
    job = stage.start("requeue", 85, WAIT="1", STATE=state)
    deadline = time.monotonic() + 30
    while not (stage.folder / "srun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    said, _ = job.communicate(timeout=30)
    assert (job.returncode, stage.asked()) == expected, said


def test_a_container_is_one_setting(stage: Stage) -> None:
    stage.play("done", 0, CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/a b:/c")
    words = (stage.folder / "srun").read_text().splitlines()
    expected = ["--container-image=image.sqsh", "--container-mounts=/a b:/c", f"--container-workdir={stage.folder}", "bash"]
    assert words[words.index("bash") - 3 :][:4] == expected


def test_the_run_folder_is_that_of_the_config(stage: Stage) -> None:
    config = write_config(stage.folder, build_corpus(stage.folder / "words"))
    assert stage.play("", 2, str(config), "run.name=other", RUN_FOLDER="") == (2, "")
    assert (stage.run.parent / "other" / "logs" / "hostfile").exists()
    assert stage.play("done", 0, str(config), "run.nam=other", RUN_FOLDER="") == (2, "")
    assert "did you mean" in stage.said
