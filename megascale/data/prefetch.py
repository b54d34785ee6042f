"""Reading ahead: a thread that keeps a few items ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """An iterator over another one that a thread reads ahead; see `prefetch`."""

    def __init__(self, iterator: Iterator[Item], depth: int):
        assert depth > 0
        # The second part is what ended the thread, if anything did.
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._fill, args=(iterator,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return item  # type: ignore[return-value]

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and waits for it; later reads end the iteration. May be called more than once."""
        self._ended = True
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _fill(self, iterator: Iterator[Item]) -> None:
        try:
            for item in iterator:
                if self._closed.is_set():
                    return
                self._ready.put((item, None))
            self._ready.put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
            self._ready.put((None, error))


def prefetch(iterator: Iterator[Item], depth: int = 2) -> Prefetcher[Item]:
    """Reads up to `depth` items ahead in a thread. An exception of the iterator is raised where its item would have come.

    Close it (it is a context manager) when it is not read to the end.
    """
    return Prefetcher(iterator, depth)
