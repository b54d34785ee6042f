"""Saves behind the training's back: what is written is what was there at the start, and failures are told by `wait`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megascale.checkpoint import save
from megascale.checkpoint.background import BackgroundSaver
from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.layout import Rectangle, full
from megascale.checkpoint.load import CheckpointReader, newest_good
from megascale.parallel.device import HostCopies
from ranks import RankPool
from runs import one_process


def alone() -> BackgroundSaver:
    return BackgroundSaver(0, 1, lambda one: [one], HostCopies(one_process().device).of)


def test_the_checkpoint_holds_what_was_there_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, original = threading.Event(), save.publish
    monkeypatch.setattr(save, "publish", lambda partial: may_write.wait(20) and original(partial))
    weight, saver, done = torch.ones(5), alone(), []
    saver.start(tmp_path, 3, [full("w", weight)], {"step": 3}, lambda: done.append(True))
    weight.zero_()  # the next step, while the writer waits
    assert newest_good(tmp_path, print) is None
    assert done == []
    may_write.set()
    saver.wait()
    assert done == [True]
    with CheckpointReader(tmp_path / "step-00000003") as reader:
        assert torch.equal(reader.read("w"), torch.ones(5))
    saver.wait()  # there is none any more


def test_a_failure_is_told_once_and_the_next_save_works(tmp_path: Path) -> None:
    saver = alone()
    (tmp_path / "file").touch()
    saver.start(tmp_path / "file", 1, [full("w", torch.ones(2))], {})
    with pytest.raises(SaveError, match="not saved"):
        saver.wait()
    saver.start(tmp_path, 2, [full("w", torch.ones(2))], {})
    saver.wait()
    assert newest_good(tmp_path, print) is not None


def save_while_training(rank: int, size: int, folder: str, broken: bool) -> str:
    """Half a tensor a rank; meanwhile the ranks exchange as training does. With `broken` rank 1 cannot copy its half."""
    world, folder = one_process(rank, size), Path(folder)
    saver = BackgroundSaver(rank, size, world.gather_aside, HostCopies(world.device).of)

    def rectangles():
        if broken and rank == 1:
            raise MemoryError("no room")
        yield Rectangle("w", (2 * size,), (2 * rank,), torch.full((2,), float(rank)))

    saver.start(folder, 1, rectangles(), {})
    for _ in range(200):
        x = torch.ones(10)
        dist.all_reduce(x)
        assert torch.equal(x, torch.full((10,), float(size)))
    try:
        saver.wait()
    except SaveError as error:
        return str(error)
    return "saved"


def test_ranks_save_beside_the_collectives_of_the_training(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(save_while_training, str(tmp_path), False, world_size=3) == ["saved"] * 3
    with CheckpointReader(tmp_path / "step-00000001") as reader:
        assert reader.read("w").tolist() == [0, 0, 1, 1, 2, 2]


def test_a_rank_that_cannot_copy_fails_the_save_on_all(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(save_while_training, str(tmp_path), True, world_size=2)
    assert first == second
    assert "rank 1 could not write" in first and "no room" in first
