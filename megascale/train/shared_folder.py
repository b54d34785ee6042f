"""Open the run folder on all ranks: rank 0 makes and checks it, and every rank has to see the same one."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from megascale.config.errors import InputError
from megascale.config.schema import Config
from megascale.parallel.agreement import name_ranks, tell
from megascale.parallel.world import World
from megascale.train.run_folder import open_run_folder

VISIBLE_SECONDS = 15.0
"""how long a new file may take to appear on other hosts of a network file system"""


def open_shared_folder(config: Config, world: World) -> Path:
    """The run folder, open on every rank. All ranks call it together.

    Raises:
        InputError: see `open_run_folder`; or the hosts do not share the folder, so that no checkpoint would be whole. On every rank.
    """
    failure = None
    if world.rank == 0:
        try:
            open_run_folder(config)
        except InputError as error:
            failure = error
    raise_together(failure, world)
    folder = Path(config.run.folder) / config.run.name
    blind = [rank for rank, sees in enumerate(_see(folder, world)) if not sees]
    if blind:
        reason = f"{name_ranks(blind)} cannot see what rank 0 writes there"
        failure = InputError(f"run folder {folder}", reason, "choose a run.folder=PATH that all hosts share")
    raise_together(failure, world)
    return folder


def raise_together(failure: InputError | None, world: World) -> None:
    """Raise rank 0's failure on all ranks. Rank 0 prints it first: a launcher ends it as soon as another rank has ended."""
    if failure is not None and world.rank == 0:
        tell(failure)
    failure = world.broadcast(failure)
    if failure is not None:
        failure.told = True
        raise failure


def _see(folder: Path, world: World) -> list[bool]:
    """Of each rank, whether it sees a file that rank 0 puts there."""
    sign = folder / f".shared-{world.broadcast(uuid.uuid4().hex)}"
    if world.rank == 0:
        sign.write_text("")
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = world.gather(sign.exists())
    if world.rank == 0:
        sign.unlink()
    return seen
