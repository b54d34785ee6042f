"""The ranks of a run: who we are, and the few collectives that the loop itself needs. One process needs no process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.config.errors import InputError
from megascale.parallel.device import Device, choose_device


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: Device

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place; x lies on the device or on the CPU."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, thing: Any) -> list[Any]:
        """The small Python objects of all ranks, in rank order."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def broadcast(self, thing: Any) -> Any:
        """Rank 0's object."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.gather(None)


def rank_variables(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local size) as deepspeed, torchrun or srun tell them; (0, 1, 0, 1) where none does."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        # deepspeed's launcher calls the ranks of a node LOCAL_SIZE
        fallback = ("0", "1", environment["RANK"], environment.get("LOCAL_SIZE", environment["WORLD_SIZE"]))
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        fallback = ("0", "1", "0", "1")
    else:
        return 0, 1, 0, 1
    values = [environment.get(key, default) for key, default in zip(keys, fallback, strict=True)]
    rank, size, local_rank, local_size = (int(value.split("(")[0].split(",")[0]) for value in values)
    return rank, size, local_rank, local_size


def start_world(timeout_seconds: float) -> World:
    """Join the other ranks, if there are any.

    Raises:
        InputError: the launcher named several ranks but no meeting place.
    """
    rank, size, local_rank, local_size = rank_variables(os.environ)
    device = choose_device(local_rank, local_size)
    if size > 1:
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            if key not in os.environ:
                raise InputError(
                    f"environment variable {key}", f"is not set, but there are {size} ranks", "export it, the same on all nodes"
                )
        torch.distributed.init_process_group(
            device.backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds), init_method="env://"
        )
    return World(rank, size, device)


def end_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        torch.distributed.destroy_process_group()
