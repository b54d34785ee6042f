"""A simulated world: one thread for each rank, collectives that pickle what they carry, as the real ones do."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.layout import Rectangle, full
from megascale.checkpoint.save import save_checkpoint


@dataclass
class Rank:
    """What one rank of the simulated world sees."""

    rank: int
    world: int
    meeting: threading.Barrier
    slots: list[bytes]

    def gather(self, value: object) -> list:
        self.slots[self.rank] = pickle.dumps(value)
        self.meeting.wait(timeout=20)
        values = [pickle.loads(slot) for slot in self.slots]
        self.meeting.wait(timeout=20)
        return values

    def broadcast(self, value: object) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.meeting.wait(timeout=20)


def run_world(world: int, task: Callable[[Rank], Any]) -> list[Any]:
    """Runs the task on every rank; returns each rank's result, or the exception it raised."""
    meeting, slots, results = threading.Barrier(world), [b""] * world, [None] * world

    def body(rank: int) -> None:
        try:
            results[rank] = task(Rank(rank, world, meeting, slots))
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank hangs"
    return results


def save_world(folder: Path, step: int, per_rank: list[list[Rectangle]], state: dict | None = None) -> list[Any]:
    """Saves with one simulated rank for each list of rectangles; returns each rank's result or exception."""
    return run_world(
        len(per_rank),
        lambda self: save_checkpoint(
            folder,
            step,
            per_rank[self.rank],
            state if state is not None else {"step": step, "tokens": step * 1000},
            rank=self.rank,
            world=self.world,
            gather=self.gather,
            barrier=self.barrier,
        ),
    )


def small_checkpoint(folder: Path, step: int, world: int = 2) -> Path:
    """A checkpoint of two tensors: "weight" [4 * world, 8] is full of the step, and split by rows; "count" is a scalar."""
    rows = 4
    per_rank = [
        [Rectangle("model/weight", (rows * world, 8), (rows * rank, 0), torch.full((rows, 8), float(step)))]
        for rank in range(world)
    ]
    per_rank[0].append(full("count", torch.tensor(step)))
    path = save_world(folder, step, per_rank)[0]
    assert isinstance(path, Path), path
    return path


@pytest.fixture(name="run_world")
def run_world_fixture() -> Callable[..., list[Any]]:
    return run_world


@pytest.fixture(name="save_world")
def save_world_fixture() -> Callable[..., list[Any]]:
    return save_world


@pytest.fixture(name="small_checkpoint")
def small_checkpoint_fixture() -> Callable[..., Path]:
    return small_checkpoint
