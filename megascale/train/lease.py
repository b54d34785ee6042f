"""A run folder belongs to one job at a time. Two that train in it would remove and mix each other's checkpoints: a user starts a run twice,
or a scheduler starts a job again while a node that it could not reach still runs the old one.

The holder's file `lease.json` says who it is, and its time is renewed. A newer job waits for a holder that ends, is refused by one that is
alive, and takes the folder from one that shows no life; an old holder that comes to life again finds another's name in the file and ends
without writing. No clocks are compared: whether a file changes is seen by watching it.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

import psutil

from megascale.config.errors import InputError
from megascale.parallel.world import World
from megascale.train.shared_folder import raise_together

NAME = "lease.json"
RENEW_SECONDS = 3.0
"""between signs of life"""
DEAD_SECONDS = 30.0
"""without a sign of life after which a holder on another machine counts as dead; also how long an ending one is waited for"""
LOOK_SECONDS = 0.2
CHECK_SECONDS = 1.0
"""between looks of the holder at whose name is in the file"""


class LeaseLost(InputError):
    """Another job has taken the run folder over: it thought that this one was dead. Nothing is written there any more."""

    def __init__(self, folder: Path):
        holder = read_holder(folder / NAME)
        reason = f"was taken over by {holder}" if holder is not None else f"is not held any more: {NAME} is gone"
        super().__init__(f"run folder {folder}", reason, "this job ends without a checkpoint; the other one goes on")


@dataclass(frozen=True)
class Holder:
    """A process, as it can be told from all others."""

    token: str
    host: str
    machine: str
    """boot and process namespace: where the number of the process means the same"""
    process: int
    started: float

    @classmethod
    def this_process(cls) -> Holder:
        """With a token of its own."""
        here = psutil.Process()
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), here.pid, here.create_time())

    def ended(self) -> bool | None:
        """Whether the process has ended; none where this machine cannot tell."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.process)
            # to a second or two: it is reckoned from the time of the boot, which follows the clock
            return abs(process.create_time() - self.started) > 2 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")


class Lease:
    """The folder is ours, until `release` or until another job takes it."""

    def __init__(self, folder: Path, me: Holder):
        self.path, self.me = folder / NAME, me
        self.ours, self.looked = True, time.monotonic()
        self.ending = Event()
        self.thread = Thread(target=self._renew, daemon=True, name="lease")
        self.thread.start()

    def _renew(self) -> None:
        while not self.ending.wait(RENEW_SECONDS):
            with suppress(OSError):  # the file may be gone, or its file system for a while: `is_lost` looks
                os.utime(self.path)  # never its content, which may be another's by now

    def is_lost(self) -> bool:
        """Whether the file bears another's name. Looks once a second at most, and puts the file back if somebody has removed it."""
        if self.ours and time.monotonic() - self.looked >= CHECK_SECONDS:
            self.looked = time.monotonic()
            with suppress(OSError):  # a network file system that does not answer: the lease stays as it was
                holder = read_holder(self.path) or _enter(self.path, self.me)
                self.ours = holder is not None and holder.token == self.me.token
        return not self.ours

    def release(self) -> None:
        """Remove the file, if it is still ours."""
        self.ending.set()
        self.thread.join()
        holder = read_holder(self.path)
        if holder is not None and holder.token == self.me.token:
            self.path.unlink(missing_ok=True)


def read_holder(path: Path) -> Holder | None:
    """Who holds a folder; none where the file is not there."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # damaged: nobody that could be told from others
        return Holder("", "an unknown host", "", 0, 0.0)


def take(folder: Path, say: Callable[[str], None]) -> Lease:
    """Hold the folder, at once or after its holder has ended or shown no life for long enough.

    Raises:
        InputError: its holder is alive.
    """
    path, me = folder / NAME, Holder.this_process()
    while _enter(path, me) != me:
        dead = _wait_for_end(path, say)
        if dead is not None:
            say(f"taking the run folder over from {dead}, which has ended or shows no life")
            _enter(path, me, over=True)
            break
    found = read_holder(path)
    if found != me:
        raise _refusal(folder, found)
    return Lease(folder, me)


def _enter(path: Path, me: Holder, over: bool = False) -> Holder | None:
    """Put a holder's name into a new file, or `over` another's; atomic on network file systems too. Who holds it then."""
    mine = path.with_name(f"{NAME}.{me.token}")
    mine.write_text(json.dumps(asdict(me)) + "\n")
    try:
        if over:
            os.replace(mine, path)
        else:
            os.link(mine, path)
    except FileExistsError:
        pass  # another was faster
    finally:
        mine.unlink(missing_ok=True)
    return read_holder(path)


def _wait_for_end(path: Path, say: Callable[[str], None]) -> Holder | None:
    """The holder that the folder can be taken from; none: it has left by itself."""
    started = since = time.monotonic()
    seen: tuple[str, int] | None = None
    told = changed = False
    while True:
        try:
            holder, sign = read_holder(path), path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if holder is None:
            return None
        ended, now = holder.ended(), time.monotonic()
        if (holder.token, sign) != seen:
            changed = seen is not None
            seen, since = (holder.token, sign), now
        if ended or (ended is None and now - since >= DEAD_SECONDS):
            return holder
        if now - started >= DEAD_SECONDS and (ended is False or changed):
            raise _refusal(path.parent, holder)
        if not told:
            say(f"waiting up to {DEAD_SECONDS:.0f} s for {holder}, which holds the run folder, to end or show no life")
            told = True
        time.sleep(LOOK_SECONDS)


def _refusal(folder: Path, holder: Holder | None) -> InputError:
    reason = f"is being trained by {holder}" if holder is not None else "was taken by another job at the same moment"
    return InputError(
        f"run folder {folder}", reason, "stop that job first (a file STOP in the folder does), or choose another run.name=NAME"
    )


@contextmanager
def hold(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[Lease | None]:
    """Rank 0 holds the folder for all until the end of the block. All ranks call it together.

    Raises:
        InputError: on all ranks, see `take`.
    """
    lease, failure = None, None
    if world.rank == 0:
        try:
            lease = take(folder, say)
        except InputError as error:
            failure = error
    raise_together(failure, world)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()
