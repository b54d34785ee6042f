"""The ranks of a run: who we are, and the few collectives that the loop itself needs. One process needs no process group."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import psutil
import torch.distributed as dist
from torch import Tensor

from megascale.config.errors import InputError
from megascale.parallel.agreement import Claim, JoinError, agree
from megascale.parallel.charge import charged_to
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
            with charged_to("world"):
                dist.all_reduce(x)
        return x

    def gather(self, thing: Any) -> list[Any]:
        """The small Python objects of all ranks, in rank order."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    @cached_property
    def gather_aside(self) -> Callable[[Any], list[Any]]:
        """`gather` over a process group of its own, for a thread beside the training. All ranks together ask for it first."""
        if self.size == 1:
            return self.gather
        group = dist.new_group(backend="gloo")

        def gather(thing: Any) -> list[Any]:
            things: list[Any] = [None] * self.size
            dist.all_gather_object(things, thing, group)
            return things

        return gather

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


def start_world(timeout_seconds: float, claim: Claim) -> World:
    """Join the other ranks, if there are any, once all claim to train the same.

    Args:
        timeout_seconds: how long to wait for the last rank, and later for any collective.
        claim: what this rank would train, or why it cannot.

    Raises:
        InputError: the launcher named several ranks but no meeting place; or ranks differ or cannot start, see `agree`.
        JoinError: the ranks did not come together.
        Exception: the claim's failure, if there is no other rank or it is no InputError.
    """
    rank, size, local_rank, local_size = rank_variables(os.environ)
    if size == 1:
        if claim.failure is not None:
            raise claim.failure
        return World(rank, size, choose_device(local_rank, local_size))
    store = _meet(rank, size, timeout_seconds)
    device = choose_device(local_rank, local_size)
    launch = {"number of ranks": str(size), "device": device.torch.type}
    facts = {**claim.facts, "launch": launch} if claim.facts else {}
    agree(dist.PrefixStore("agreement", store), rank, size, Claim(facts, claim.failure), timeout_seconds)
    if local_size < size:
        choose_interface(dist.PrefixStore("interface", store), rank, size, os.environ)
    dist.init_process_group(
        device.backend,
        store=dist.PrefixStore("world", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return World(rank, size, device)


def _meet(rank: int, size: int, timeout_seconds: float) -> dist.Store:
    """The key-value store at the launcher's meeting place: rank 0 serves it, or torchrun's agent does."""
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in os.environ:
            raise InputError(
                f"environment variable {key}", f"is not set, but there are {size} ranks", "export it, the same on all nodes"
            )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # Not waiting for all: `agree` does, and can say who is missing.
        return dist.TCPStore(address, int(port), size, serve, timedelta(seconds=timeout_seconds), wait_for_workers=False)
    except dist.DistNetworkError as error:
        place, reason = f"MASTER_ADDR {address}, MASTER_PORT {port}", str(error).splitlines()[0]
        if serve:
            raise InputError(place, reason, "is another run using the port? choose another: `--master_port N`") from error
        raise JoinError(
            place, reason, "rank 0's output tells why it does not answer; or its host is not reachable here"
        ) from error


def choose_interface(store: dist.Store, rank: int, size: int, environment: MutableMapping[str, str]) -> None:
    """Let gloo use the network interface that leads to the other ranks, unless GLOO_SOCKET_IFNAME is set. All ranks call it.

    Gloo takes the address of this host's name, which on Debian and its relatives is a loopback address: no other host reaches it.
    So each rank takes the address from which it reaches MASTER_ADDR. On the host of that name this may be loopback again; there it
    takes the address from which it reaches a rank elsewhere.
    """
    own = _address_towards(environment["MASTER_ADDR"])
    store.set(f"address/{rank}", own)
    if own.startswith("127."):
        others = (store.get(f"address/{other}").decode() for other in range(size))
        elsewhere = next((address for address in others if address and not address.startswith("127.")), None)
        own = _address_towards(elsewhere) if elsewhere else own
    names = [name for name, rows in psutil.net_if_addrs().items() if any(row.address == own for row in rows)]
    if names:
        environment.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _address_towards(host: str) -> str:
    """This host's IPv4 address on the way to another one; empty if there is none (gloo decides then). Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # any port
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def end_world(world: World) -> None:
    """Leave the process group, also that of a single rank, which DeepSpeed needs."""
    if dist.is_initialized():
        dist.destroy_process_group()
