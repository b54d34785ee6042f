"""Why and how a run ends: signals and the STOP file become a flag that all ranks read at the step boundary; exit.json tells the reason."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

EXIT_CODES = {"done": 0, "stop": 0, "error": 1, "bad_input": 2, "requeue": 85}
"""Process exit code by the reason in exit.json. Launchers may swallow codes, so job scripts read the file."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or a STOP file. The handlers only set a flag: ranks are signalled one after the other, and a handler that
    entered a collective would wait for ranks that were not signalled yet.
    """

    NONE, STOP, REQUEUE = 0, 1, 2

    def __init__(self, stop_file: Path):
        self.stop_file, self.level = stop_file, self.NONE
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self.level = max(self.level, self.STOP if number == signal.SIGINT else self.REQUEUE)

    def poll(self, rank: int) -> int:
        """The level on this rank; rank 0 also looks for the STOP file."""
        if rank == 0 and self.stop_file.exists():
            self.level = max(self.level, self.STOP)
        return self.level


def write_exit(run_folder: Path, reason: str, **facts: object) -> int:
    """Write exit.json (reason, exit code, time, facts) by an atomic rename and return the exit code."""
    code = EXIT_CODES[reason]
    record = {"reason": reason, "code": code, "time": time.time(), **facts}
    partial = run_folder / f"exit.json.{os.getpid()}"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, run_folder / "exit.json")
    return code
