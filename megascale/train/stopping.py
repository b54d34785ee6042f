"""Why and how a run ends: signals, the files STOP and REQUEUE and a dead launcher become a flag, read after each step.

exit.json tells why.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

from megascale.train.launcher import LauncherWatch
from megascale.train.lease import Lease

EXIT_CODES = {"done": 0, "stop": 0, "error": 1, "bad_input": 2, "requeue": 85}
"""Process exit code by the reason in exit.json. Launchers may swallow codes, so job scripts read the file."""


class StopRequest:
    """Set by a signal, a file STOP or REQUEUE in the run folder, or the death of the launcher.

    TERM, USR1 and HUP ask for a checkpoint and a requeue, INT (Ctrl-C) for a checkpoint and the end. The first signal decides: on
    Ctrl-C deepspeed's launcher sends TERM after the terminal's INT. The handlers only set a flag: ranks are signalled one after the
    other, and a handler that entered a collective would wait for ranks that were not signalled yet.

    REQUEUE asks for what TERM does, from any host and past any launcher: a job script writes it, whose signals reach the launchers only.
    The run removes it. STOP stays, and keeps the run from starting again.
    """

    NONE, STOP, REQUEUE, LOST = 0, 1, 2, 3
    """LOST: another job has taken the run folder, in which nothing may be written any more"""

    launcher: LauncherWatch | None = None
    lease: Lease | None = None
    """rank 0's"""
    cause = ""
    """what asked this rank to stop; empty if nothing did"""

    def __init__(self, stop_file: Path, launcher: LauncherWatch | None = None, lease: Lease | None = None):
        self.stop_file, self.level, self.launcher, self.lease = stop_file, self.NONE, launcher, lease
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._signalled)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._ask(self.STOP if number == signal.SIGINT else self.REQUEUE, signal.Signals(number).name)

    def _ask(self, level: int, cause: str) -> None:
        if self.level == self.NONE:
            self.level, self.cause = level, cause

    def poll(self, rank: int) -> int:
        """The level on this rank; rank 0 also looks for the files, and every rank for its launcher."""
        if self.lease is not None and self.lease.is_lost():
            return self.LOST
        if rank == 0:
            self._look_for_files()
        if self.launcher is not None and self.launcher.gone():
            self._ask(self.REQUEUE, "the launcher died")
        return self.level

    def _look_for_files(self) -> None:
        if self.stop_file.exists():
            self._ask(self.STOP, "STOP file")
        requeue_file = self.stop_file.with_name("REQUEUE")
        if requeue_file.exists():
            requeue_file.unlink(missing_ok=True)
            self._ask(self.REQUEUE, "REQUEUE file")


def write_exit(run_folder: Path, reason: str, **facts: object) -> int:
    """Write exit.json (reason, exit code, time, facts) by an atomic rename and return the exit code."""
    code = EXIT_CODES[reason]
    record = {"reason": reason, "code": code, "time": time.time(), **facts}
    partial = run_folder / f"exit.json.{os.getpid()}"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, run_folder / "exit.json")
    return code
