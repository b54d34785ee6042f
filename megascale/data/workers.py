"""Worker processes: an ordered, parallel map that shows progress and leaves no orphans."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from megascale.config.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """A pool of processes, used as a context manager.

    Processes are spawned, not forked: the thread pool inside `tokenizers` does not survive a fork.

    Args:
        count: number of processes.
    """

    def __init__(self, count: int):
        self.count = count
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterator[Task], total: int, title: str) -> Iterator[Result]:
        """Results in the order of the tasks; few tasks are under way at a time, so they may be made lazily.

        Raises:
            InputError: a worker process died.
        """
        from rich.console import Console
        from rich.progress import Progress

        pending: deque[Future[Result]] = deque()
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
            bar = progress.add_task(title, total=total)
            try:
                for task in tasks:
                    pending.append(self.pool.submit(function, task))
                    if len(pending) > 2 * self.count:
                        yield pending.popleft().result()
                        progress.advance(bar)
                while pending:
                    yield pending.popleft().result()
                    progress.advance(bar)
            except BrokenProcessPool as error:
                remedy = "run the same command again: it goes on where it stopped; fewer --workers need less memory"
                raise InputError(title, "a worker process died, perhaps for lack of memory", remedy) from error


def _start_worker() -> None:
    # One thread a process: the processes already fill the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone; a killed parent cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
