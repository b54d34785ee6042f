"""Checkpoints written while the training goes on: the step waits for a copy in host memory, a thread writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread

from torch import Tensor

from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.save import Gather, save_checkpoint

GIVE_UP_SECONDS = 10.0


def _raising(error: Exception) -> Iterator[Rectangle]:
    raise error
    yield


class BackgroundSaver:
    """One save at a time. All ranks start and wait together. Their threads exchange outcomes over a group of their own, so that a save
    fails on all ranks alike, and every rank learns of it in its next `wait`.

    Args:
        gather: see `save_checkpoint`; over a process group that nobody else uses meanwhile.
        copies: of tensors in host memory, which stay as they are until the next call.
    """

    def __init__(self, rank: int, world: int, gather: Gather, copies: Callable[[Sequence[Tensor]], list[Tensor]]):
        self.rank, self.world, self.gather, self.copies = rank, world, gather, copies
        self.thread: Thread | None = None
        self.step: int | None = None
        """of the newest save"""
        self.failure: Exception | None = None

    def start(
        self,
        folder: Path,
        step: int,
        rectangles: Iterable[Rectangle],
        state: Mapping[str, object],
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the rectangles and write them behind the caller's back; the save before has to be waited for.

        Args:
            folder, step, rectangles, state: see `save_checkpoint`. The state is kept as it is.
            after: called in the thread when the checkpoint is there.
        """
        assert self.thread is None, "wait for the save before"
        self.step, copies = step, self._copied(rectangles)

        def work() -> None:
            try:
                exchange = {"gather": self.gather, "barrier": lambda: self.gather(None)}
                save_checkpoint(folder, step, copies, state, rank=self.rank, world=self.world, **exchange)  # type: ignore[arg-type]
                after()
            except Exception as error:  # noqa: BLE001 (raised again by `wait`, in the thread that can act on it)
                self.failure = error

        # a run that ends by an error does not wait for its disk: half a checkpoint is never read
        self.thread = Thread(target=work, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the save under way is done, if there is one.

        Raises:
            SaveError: it failed; the same on all ranks.
        """
        if self.thread is None:
            return
        self.thread.join()
        self.thread, failure, self.failure = None, self.failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, *_: object) -> None:
        """A run that ends by an error lets the save under way end, if it does so soon."""
        if self.thread is not None:
            self.thread.join(GIVE_UP_SECONDS)

    def _copied(self, rectangles: Iterable[Rectangle]) -> Iterable[Rectangle]:
        try:
            found = list(rectangles)
            copies = self.copies([one.tensor for one in found])
        except Exception as error:  # noqa: BLE001 (no memory, perhaps: the other ranks have to be told, which the save does)
            return _raising(error)
        return [replace(one, tensor=copy) for one, copy in zip(found, copies, strict=True)]
