"""Which processes above a rank are launchers, and how a rank sees that one of them died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from megascale.train.launcher import LauncherWatch, is_launcher, parent_of
from runs import ROOT

PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize(
    "arguments",
    [
        [PYTHON, "/venv/bin/deepspeed", "--num_gpus=2", "train.py"],
        [PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"],
        [PYTHON, "-m", "torch.distributed.run", "train.py"],
        [PYTHON, "/venv/bin/torchrun", "train.py"],
    ],
)
def test_launchers(arguments: list[str]) -> None:
    assert is_launcher(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bash", "-c", "deepspeed train.py &"],
        ["bash", "job.sh", "deepspeed"],
        [PYTHON, "train.py", "-m", "torch.distributed.run"],
        [PYTHON, "-m", "pytest", "torchrun"],
        [PYTHON, "-m"],
        ["-bash"],
        ["slurmstepd: [7.0]"],
        [],
    ],
)
def test_other_programs(arguments: list[str]) -> None:
    assert not is_launcher(arguments)


def test_the_parent_of_a_process() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None


# A rank that prints whether it was launched, waits for a line, and tells whether its launcher is gone within some seconds.
RANK = """
import sys, time
from megascale.train.launcher import LauncherWatch
watch = LauncherWatch()
print(watch.launched, watch.gone(), flush=True)
sys.stdin.readline()
deadline = time.monotonic() + float(sys.argv[1])
while not watch.gone() and time.monotonic() < deadline:
    time.sleep(0.01)
print(watch.gone(), flush=True)
"""


# A parent: prints its process id, starts the next program and waits for it.
PARENT = """
import os, subprocess, sys
print(os.getpid(), flush=True)
subprocess.call([sys.executable, {child!r}, *sys.argv[1:]])
"""


class Family:
    """A rank below some parents, each of which starts the next; their process ids, from the top."""

    def __init__(self, folder: Path, *names: str, patience: float = 20.0):
        programs = [*(folder / name for name in names), folder / "rank.py"]
        for program, child in pairwise(programs):
            program.write_text(PARENT.format(child=str(child)))
        programs[-1].write_text(RANK)
        self.process = subprocess.Popen(
            [sys.executable, str(programs[0]), str(patience)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ids = [int(self.line()) for _ in names]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self, index: int) -> str:
        """Kill a parent; what the rank says then."""
        os.kill(self.ids[index], signal.SIGKILL)
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = self.line()
        for process in self.ids:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        return said


@pytest.mark.parametrize("killed", [0, 1], ids=["deepspeed", "the wrapper"])
def test_the_death_of_any_launcher_above_is_seen(tmp_path: Path, killed: int) -> None:
    """A wrapper script between launcher and rank is part of the chain."""
    family = Family(tmp_path, "deepspeed", "wrapper.py")
    assert family.line() == "True False"
    assert family.kill(killed) == "True"


def test_the_death_of_an_ordinary_parent_is_none_of_our_business(tmp_path: Path) -> None:
    family = Family(tmp_path, "shell.py", patience=0.5)
    assert family.line() == "False False"
    assert family.kill(0) == "False"


def test_what_lies_above_the_launcher_is_not_watched(tmp_path: Path) -> None:
    family = Family(tmp_path, "shell.py", "torchrun", patience=0.5)
    assert family.line() == "True False"
    assert family.kill(0) == "False"


def test_this_process_has_no_launcher() -> None:
    assert not LauncherWatch().launched
