"""Everything that waits for a GPU, in one call of ten minutes: the kernels' tests on it, then each table.

`python -m benchmarks gpu --out FOLDER`. A part that fails or takes too long ends alone; what it said is in FOLDER/PART.log, results are in
FOLDER and in benchmarks/results. `--device cpu` tries the same parts in small, to see that they run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import RESULTS, print_table

ROOT = RESULTS.parents[1]


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    words: tuple[str, ...]
    """behind `python -m`"""
    seconds: int
    """that it may take on a GPU; on a CPU four times as many"""

    def command(self, device: str) -> list[str]:
        """On a GPU or, in small, on a CPU."""
        small = () if device == "cuda" or self.words[0] == "pytest" else SMALL.get(self.name, ())
        where = () if self.words[0] == "pytest" else ("--device", device)
        return [sys.executable, "-m", *self.words, *where, *small]


PARTS = (
    Part("tests", ("pytest", "-q", "--maxfail=20", "tests/kernels"), 150),
    Part("kernels", ("benchmarks", "kernels"), 120),
    Part("moe", ("benchmarks", "moe"), 70),
    Part("step", ("benchmarks", "step"), 210),
    Part("memory", ("benchmarks", "memory"), 40),
)
TINY = ("--width", "64", "--layers", "2", "--vocabulary", "256", "--batch", "2", "--length", "64")
SMALL = {"step": (*TINY, "--rounds", "1"), "memory": TINY}


def run_part(part: Part, device: str, folder: Path) -> dict[str, object]:
    """Run it; how it ended. Its output is FOLDER/PART.log."""
    begin, limit = time.monotonic(), part.seconds * (1 if device == "cuda" else 4)
    with open(folder / f"{part.name}.log", "wb") as log:
        try:
            code: int | str = subprocess.run(
                part.command(device), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit} s"
    return {"part": part.name, "exit": code, "seconds": time.monotonic() - begin}


def main(arguments: list[str]) -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser("python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", nargs="+", choices=[part.name for part in PARTS], help="only these")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    kept = {path: path.read_bytes() for path in RESULTS.glob("*.json")}
    rows = [run_part(part, given.device, given.out) for part in PARTS if not given.part or part.name in given.part]
    print_table(rows)
    for result in sorted(RESULTS.glob("*.json")):
        if result.stat().st_mtime >= begin:
            shutil.copy(result, given.out)
            print(given.out / result.name)
            if given.device == "cpu":  # a trial in small: what was measured in earnest stays
                result.write_bytes(kept[result]) if result in kept else result.unlink()
    if any(row["exit"] != 0 for row in rows):
        sys.exit(1)
