"""Runs a function on several gloo ranks of this machine, one process each: the ground of every test that communicates.

`run_ranks` starts fresh processes for one call. `RankPool` keeps its processes between calls (a start costs seconds of
imports): tests get one through the fixture `ranks`. Each call has a process group of its own and starts from seed 0. What a
function leaves in its process besides (caches, patched modules) stays there for the next one; where that matters, use
`run_ranks`. After any failure the pool ends its processes and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parent
MAXIMUM_RANKS = 16
# A real-time signal, because code under test installs handlers of its own for SIGUSR1, SIGUSR2 and SIGTERM.
STACKS_SIGNAL = signal.SIGRTMIN + 3
# After the first failure, how long the others may still report theirs: a rank that died explains its peers' broken connections.
GRACE_SECONDS = 0.5
# A process group that Python has not collected yet keeps three threads, and engines are cycles.
MOST_LEFT_THREADS = 30


class RankError(RuntimeError):
    """A rank raised or died. The text holds the traceback of every rank that did, `rank` is the first of them."""

    def __init__(self, rank: int, text: str):
        self.rank = rank
        super().__init__(text)


class RankTimeout(RankError):
    """A rank missed the deadline. The text holds the stacks of all ranks that did, `rank` is the lowest of them."""


@dataclass(frozen=True)
class Call:
    """One function call as it travels to a rank. The function goes by name: test modules cannot be pickled by reference."""

    module: str
    file: str
    function: str
    arguments: bytes
    world_size: int
    store: str
    master_port: int
    timeout: float


@dataclass(frozen=True)
class Report:
    """What a rank answers: its pickled result, or the text of its failure."""

    result: bytes = b""
    failure: str = ""
    died: bool = False


@dataclass
class Rank:
    """One process of a pool, seen from the test's process."""

    process: BaseProcess
    channel: connection.Connection
    stacks: Path
    report: Report | None = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls ``function(rank, world_size, *args)`` on `world_size` fresh ranks and returns the results in rank order.

    Args:
        function: defined at the top level of a module; torch.distributed (gloo) is initialised when it is called.
        args: picklable, the same for every rank.
        timeout: seconds the call may take, without the start of the processes.

    Raises:
        RankError: a rank raised or died. All ranks are killed.
        RankTimeout: the deadline passed. All ranks are killed.
    """
    with RankPool(world_size) as pool:
        return pool.run(function, *args, timeout=timeout)


class RankPool:
    """Rank processes that stay alive between calls. They start at the first call and grow in number when a call needs more."""

    def __init__(self, world_size: int = 2, start_timeout: float = 180):
        self.world_size = world_size
        self._start_timeout = start_timeout
        self._ranks: list[Rank] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls = 0
        # multiprocessing waits for its processes when Python ends; handlers run in reverse order, so this one ends them first.
        atexit.register(self.close)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        atexit.unregister(self.close)
        self._folder.cleanup()

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the ranks alive now, by rank."""
        return [rank.process.pid for rank in self._ranks if rank.process.pid is not None]

    def run(self, function: Callable[..., Any], *args: Any, world_size: int | None = None, timeout: float = 120) -> list[Any]:
        """As `run_ranks`, on the first `world_size` processes of the pool (default: the pool's own world size)."""
        size = self.world_size if world_size is None else world_size
        if not 1 <= size <= MAXIMUM_RANKS:
            raise ValueError(f"world_size is {size}; a pool has 1 to {MAXIMUM_RANKS} ranks")
        self._calls += 1
        call = _describe(function, args, size, f"{self._folder.name}/store-{self._calls}", timeout)
        try:
            self._start(size)
            self._send_all(size, pickle.dumps(call))
            return [pickle.loads(report.result) for report in self._wait(range(size), timeout, call.function)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills all processes; the next call starts new ones."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.channel.close()
        self._ranks.clear()

    def _start(self, size: int) -> None:
        first = len(self._ranks)
        context = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"):
            for rank in range(first, size):
                channel, far_end = context.Pipe()
                stacks = Path(self._folder.name, f"stacks-{rank}")
                process = context.Process(target=_serve, args=(rank, far_end, str(stacks)), name=f"rank {rank}")
                process.start()
                far_end.close()
                self._ranks.append(Rank(process, channel, stacks))
        self._wait(range(first, size), self._start_timeout, "start")

    def _send_all(self, size: int, message: bytes) -> None:
        for rank in self._ranks[:size]:
            # A rank that died between two calls: its end is reported by the wait that follows.
            with contextlib.suppress(BrokenPipeError):
                rank.channel.send_bytes(message)

    def _wait(self, numbers: range, timeout: float, name: str) -> list[Report]:
        """Waits for one report of each rank; raises for the failures among them."""
        for number in numbers:
            self._ranks[number].report = None
        deadline = time.monotonic() + timeout
        failed: list[int] = []
        while waiting := [number for number in numbers if self._ranks[number].report is None]:
            channels = [self._ranks[number].channel for number in waiting]
            ready = connection.wait(channels, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for number in (number for number in waiting if self._ranks[number].channel in ready):
                report = self._ranks[number].report = _receive(self._ranks[number])
                if report.failure:
                    failed.append(number)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failed:
            raise self._failure(failed, name, len(numbers))
        if waiting:
            raise self._timeout(waiting, name, timeout)
        return [answer for number in numbers if (answer := self._ranks[number].report) is not None]

    def _failure(self, failed: list[int], name: str, size: int) -> RankError:
        reports = {number: report for number in failed if (report := self._ranks[number].report) is not None}
        order = sorted(failed, key=lambda number: not reports[number].died)  # stable: the dead first, then by arrival
        text = "\n".join(f"rank {number} of {size} in {name}: {reports[number].failure}" for number in order)
        return RankError(order[0], text)

    def _timeout(self, waiting: list[int], name: str, timeout: float) -> RankTimeout:
        for number in waiting:
            process_id = self._ranks[number].process.pid
            assert process_id is not None
            os.kill(process_id, STACKS_SIGNAL)
        time.sleep(0.5)
        stacks = (self._ranks[number].stacks for number in waiting)
        texts = [file.read_text() if file.exists() else "no stacks: it was still starting\n" for file in stacks]
        text = "\n".join(f"rank {number}:\n{text}" for number, text in zip(waiting, texts, strict=True))
        return RankTimeout(waiting[0], f"{name}: ranks {waiting} did not finish in {timeout:g} s\n{text}")


def _describe(function: Callable[..., Any], args: tuple[Any, ...], world_size: int, store: str, timeout: float) -> Call:
    name, module = function.__qualname__, function.__module__
    if "<" in name:
        raise TypeError(f"{name} cannot run on other ranks: define it at the top level of its module")
    file = str(Path(function.__code__.co_filename).resolve())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Call(module, file, name, pickle.dumps(args), world_size, store, port, timeout)


def _receive(rank: Rank) -> Report:
    try:
        return pickle.loads(rank.channel.recv_bytes())
    except (EOFError, ConnectionResetError):
        rank.process.join()
        return Report(failure=f"the process ended with exit code {rank.process.exitcode}", died=True)


# On the rank's side ---------------------------------------------------------------------------------------------------


def _serve(number: int, channel: connection.Connection, stacks_file: str) -> None:
    """Answers calls until the test's process ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(stacks_file, "w") as stacks:
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        channel.send_bytes(pickle.dumps(Report()))
        while True:
            call = pickle.loads(channel.recv_bytes())
            channel.send_bytes(pickle.dumps(_answer(number, call)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(number: int, call: Call) -> Report:
    try:
        function = _find(call)
        args = pickle.loads(call.arguments)
        with _process_group(number, call):
            result = function(number, call.world_size, *args)
            return Report(result=pickle.dumps(result))
    except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, it is raised again in the test's process
        return Report(failure=traceback.format_exc())
    finally:
        if threading.active_count() < len(os.listdir("/proc/self/task")) - MOST_LEFT_THREADS:
            gc.collect()


def _find(call: Call) -> Callable[..., Any]:
    """The function by name. A test module is loaded from its file: the folders of tests are not packages."""
    module = sys.modules.get(call.module)
    if module is None and Path(call.file).is_relative_to(TESTS):
        specification = importlib.util.spec_from_file_location(call.module, call.file)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[call.module] = module
        specification.loader.exec_module(module)
    if module is None:
        module = importlib.import_module(call.module)
    return getattr(module, call.function)


@contextlib.contextmanager
def _process_group(number: int, call: Call) -> Iterator[None]:
    """The call's own default process group and the variables a launcher would set."""
    import torch
    from torch import distributed

    from isolation import compiled_here_only

    rank, size = str(number), str(call.world_size)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(call.master_port)}
    # Longer than the pool's deadline, which shows the stacks of all ranks instead of one rank's broken connection.
    patience = timedelta(seconds=call.timeout + 60)
    with mock.patch.dict(os.environ, variables), compiled_here_only():
        distributed.init_process_group(
            "gloo", init_method=f"file://{call.store}", rank=number, world_size=call.world_size, timeout=patience
        )
        torch.manual_seed(0)
        yield
        if distributed.is_initialized():
            # A rank that leaves first closes its connections while others may still read from them.
            distributed.barrier()
            _destroy_process_group()


def _destroy_process_group() -> None:
    from torch import distributed

    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None and deepspeed.cdb is not None:
        # DeepSpeed keeps groups in module variables; through its own call it forgets them too.
        deepspeed.destroy_process_group()
        deepspeed.cdb = None
    if distributed.is_initialized():
        distributed.destroy_process_group()
