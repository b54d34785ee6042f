"""Run as a program: kills a save (or a prune) at each of its steps, and says what a reader finds after each kill.

A child is forked for each kill, so torch is imported once. A step is anything that touches the disk: every audit event of the
interpreter that names the checkpoint folder (open, mkdir, rename, listdir), every deletion and fsync, the middle of every write.
Prints one JSON list with an object for each kill: its number, what it hit, what a reader finds, and what the next save leaves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from io import FileIO
from itertools import count
from pathlib import Path

import torch

from megascale.checkpoint import files
from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.load import newest_good
from megascale.checkpoint.retention import prune
from megascale.checkpoint.save import save_checkpoint

ROWS = 4


def save(folder: Path, step: int, value: float, world: int) -> None:
    """Saves with `world` ranks as threads; each owns some rows of one tensor that is full of the value."""
    meeting, slots = threading.Barrier(world), [None] * world

    def rank_body(rank: int) -> None:
        def gather(one: object) -> list:
            slots[rank] = one  # type: ignore[call-overload]
            meeting.wait()
            everything = list(slots)
            meeting.wait()
            return everything

        piece = Rectangle("w", (ROWS * world, 8), (ROWS * rank, 0), torch.full((ROWS, 8), value))
        save_checkpoint(folder, step, [piece], {"value": value}, rank=rank, world=world, gather=gather, barrier=meeting.wait)

    threads = [threading.Thread(target=rank_body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class KillAt:
    """Counts steps and kills this process, as `kill -9` does, at the given one; tells the parent what it hit."""

    def __init__(self, number: int, folder: Path, report: int):
        self.number, self.folder, self.report, self.count, self.lock = number, str(folder), report, 0, threading.Lock()
        write_all = files.write_all

        def counted_fsync(descriptor: int) -> None:
            self.step("fsync")

        def killing_write(file: FileIO, block: memoryview) -> None:
            write_all(file, block[: len(block) // 2])
            self.step("mid write")
            write_all(file, block[len(block) // 2 :])

        os.fsync, files.write_all = counted_fsync, killing_write  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        names_folder = bool(arguments) and self.folder in str(arguments[0])
        # While a tree is deleted, files are named relative to an open folder.
        if event in ("os.remove", "os.rmdir") or (names_folder and event.split(".")[0] in ("open", "os", "shutil")):
            self.step(event)

    def step(self, what: str) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.number:
                os.write(self.report, what.encode())
                os.kill(os.getpid(), signal.SIGKILL)


def run_killed(number: int, folder: Path, action: Callable[[], object]) -> str | None:
    """Runs the action in a child that is killed at a step; returns what the kill hit, None when the child finished before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            KillAt(number, folder, writing)
            action()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    what = os.read(reading, 100).decode()
    os.close(reading)
    if os.WIFSIGNALED(status):
        return what
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return None


def what_a_reader_finds(folder: Path) -> dict:
    """The newest good checkpoint, whole or not, and the lines reported on the way."""
    lines: list[str] = []
    try:
        reader = newest_good(folder, lines.append)
    except CheckpointError as error:
        return {"error": str(error), "lines": lines}
    if reader is None:
        return {"step": None, "value": None, "lines": lines}
    weight = reader.read("w")
    assert bool((weight == reader.state["value"]).all()), "a mix of two checkpoints"
    return {"step": reader.step, "value": reader.state["value"], "lines": lines}


def main(base: Path, scenario: str, world: int) -> None:
    """Scenarios: first (no checkpoint before), next (step 200 after 100), replace (step 100 again), prune (of 100, 200, 300)."""
    before = {"first": [], "next": [100], "replace": [100], "prune": [100, 200, 300]}[scenario]
    actions: dict[str, Callable[[Path], object]] = {
        "first": lambda folder: save(folder, 100, 1.0, world),
        "next": lambda folder: save(folder, 200, 2.0, world),
        "replace": lambda folder: save(folder, 100, -100.0, world),
        "prune": lambda folder: prune(folder, 1, 0),
    }
    results = []
    for number in count(1):
        folder = base / f"{scenario}-{number}"
        for step in before:
            save(folder, step, float(step), world)
        hit = run_killed(number, folder, partial(actions[scenario], folder))
        if hit is None:
            break
        found = what_a_reader_finds(folder)
        save(folder, 900, 9.0, world)
        left = sorted(path.name for path in folder.iterdir())
        results.append({"number": number, "hit": hit, **found, "left": left, "after": what_a_reader_finds(folder)["step"]})
        shutil.rmtree(folder)
    print(json.dumps(results))


if __name__ == "__main__":
    # A killed process loses nothing it has written, only a machine does: the steps are counted, the waiting is spared.
    os.fsync = lambda fd: None
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
