"""Is the launcher that started this rank still there?

A rank whose launcher died is an orphan: nobody ends it when its peers fail, and a job script may already start the run again beside
it. The `deepspeed` command starts `deepspeed.launcher.launch`, which starts the ranks; TERM ends the former and nothing else
(deepspeed 0.19.8 on one node), so all launchers above a rank are watched, not its parent alone. Other ancestors (a shell under nohup,
srun's daemon) are not: a run may outlive them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
SCRIPTS = {"deepspeed", "deepspeed.pt", "ds", "torchrun"}


class LauncherWatch:
    """Knows the launchers above this process. Make it early: a launcher that has died before is not seen."""

    def __init__(self) -> None:
        self._links = list(_links_to_launchers())
        """(process, its parent), from this process up to the topmost launcher"""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process."""
        return bool(self._links)

    def gone(self) -> bool:
        """Whether one of the launchers has died: some process of the chain has another parent now. Costs some microseconds."""
        return any(parent_of(process) != parent for process, parent in self._links)


def _links_to_launchers() -> Iterator[tuple[int, int]]:
    pending: list[tuple[int, int]] = []  # given out once a launcher is found above them: a rank may run in a wrapper script
    process = os.getpid()
    while parent := parent_of(process):
        pending.append((process, parent))
        if is_launcher(_arguments(parent)):
            yield from pending
            pending.clear()
        process = parent


def is_launcher(arguments: Sequence[str]) -> bool:
    """Whether a process with these arguments is deepspeed's or torch's launcher, started as a script or by `python -m`."""
    for position, word in enumerate(arguments):
        if word == "-m":
            return arguments[position + 1 : position + 2] != [] and arguments[position + 1] in MODULES
        if Path(word).name in SCRIPTS:
            return True
        if position > 0 and not word.startswith("-"):
            return False  # what python runs is something else
    return False


def parent_of(process: int) -> int | None:
    """The parent's process id; None if the process is gone, 0 if its parent lies outside of this container."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])  # the name, in parentheses, may hold anything


def _arguments(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
