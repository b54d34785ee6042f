"""The same with real processes and torch.distributed's collectives."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.load import open_newest
from megascale.checkpoint.save import save_checkpoint


def gather(value: object) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: object) -> object:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def save_then_fail_then_load(rank: int, world: int, folder: str) -> tuple[str, int | None, list[float]]:
    """Step 1 is complete; at step 2 rank 1 does not give its piece; then everyone opens the newest."""
    piece = Rectangle("w", (world, 3), (rank, 0), torch.full((1, 3), float(rank)))
    save_checkpoint(Path(folder), 1, [piece], {}, rank=rank, world=world, gather=gather, barrier=dist.barrier)
    message = ""
    try:
        pieces = [] if rank == 1 else [piece]
        save_checkpoint(Path(folder), 2, pieces, {}, rank=rank, world=world, gather=gather, barrier=dist.barrier)
    except SaveError as error:
        message = str(error)
    reader = open_newest(Path(folder), rank, broadcast, print)
    assert reader is not None
    return message, reader.step, reader.read("w")[:, 0].tolist()


def test_real_ranks_save_fail_and_load_alike(ranks, tmp_path) -> None:
    results = ranks.run(save_then_fail_then_load, str(tmp_path), world_size=2)
    assert results[0] == results[1]
    message, step, column = results[0]
    assert "tensor w: 3 elements were given, shape (2, 3) has 6" in message
    assert (step, column) == (1, [0.0, 1.0])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
