"""Everything that waits for a GPU, in one call of ten minutes: the kernels' tests on it, then each table.

`python -m benchmarks gpu --out FOLDER`. A part that fails or takes too long ends alone; what it said is in FOLDER/PART.log, and behind
each part its results are in FOLDER and in benchmarks/results. `--device cpu` tries the same parts in small, to see that they run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, print_table

ROOT = RESULTS.parents[1]
LAST_WORDS = 10.0
"""seconds that a part may take to end by itself when its time is over"""


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    words: tuple[str, ...]
    """behind `python -m`"""
    seconds: int
    """that it may take on a GPU"""

    def command(self, device: str) -> list[str]:
        """On a GPU or, in small, on a CPU."""
        small = () if device == "cuda" or self.words[0] == "pytest" else SMALL.get(self.name, ())
        where = () if self.words[0] == "pytest" else ("--device", device)
        return [sys.executable, "-m", *self.words, *where, *small]


PARTS = (
    Part("tests", ("pytest", "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider", "tests/kernels/gpu"), 110),
    Part("moe", ("benchmarks", "moe"), 60),
    Part("step", ("benchmarks", "step"), 170),
    Part("kernels", ("benchmarks", "kernels"), 150),
    Part("memory", ("benchmarks", "memory"), 50),
)
TINY = ("--width", "64", "--layers", "2", "--vocabulary", "256", "--batch", "2", "--length", "64")
SMALL = {"step": (*TINY, "--rounds", "1"), "memory": TINY}


def run_part(part: Part, device: str, folder: Path, limit: float) -> dict[str, object]:
    """Run it for at most so many seconds; how it ended. Its output is FOLDER/PART.log. A part that is stopped may first say what it has
    (pytest: its failures), and leaves no process behind.
    """
    begin = time.monotonic()
    with open(folder / f"{part.name}.log", "wb") as log:
        process = subprocess.Popen(part.command(device), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"part": part.name, "exit": code, "seconds": time.monotonic() - begin}


class _Results:
    """What a part has stored: copied to a folder, and on a CPU, where it was a trial in small, taken back."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.before = {path: path.read_bytes() for path in RESULTS.glob("*.json")}
        self.times = {path: path.stat().st_mtime_ns for path in self.before}

    def keep(self) -> None:
        """Copy what is new."""
        for path in sorted(RESULTS.glob("*.json")):
            if path.stat().st_mtime_ns == self.times.get(path):
                continue
            shutil.copy(path, self.folder)
            print(self.folder / path.name, flush=True)
            if self.device == "cpu":
                path.write_bytes(self.before[path]) if path in self.before else path.unlink()
            if path.exists():
                self.times[path] = path.stat().st_mtime_ns


def main(arguments: list[str]) -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser("python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=560, help="for all parts; on a CPU four times as many")
    parser.add_argument("--part", nargs="+", choices=[part.name for part in PARTS], help="only these")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the parts in small")
    patience = 1 if given.device == "cuda" else 4
    end, rows, results = time.monotonic() + patience * given.seconds, [], _Results(given.out, given.device)
    for part in PARTS:
        if not given.part or part.name in given.part:
            rows.append(run_part(part, given.device, given.out, max(1.0, min(patience * part.seconds, end - time.monotonic()))))
            print_table(rows[-1:])
            results.keep()
    print_table(rows)
    if any(row["exit"] != 0 for row in rows):
        sys.exit(1)
