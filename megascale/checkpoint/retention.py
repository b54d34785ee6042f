"""Which checkpoints are kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.folders import discard, list_checkpoints, step_of
from megascale.checkpoint.load import newest_good


def prune(folder: Path, keep_last: int, keep_every: int, report: Callable[[str], None] = warnings.warn) -> list[int]:
    """Delete old checkpoints. Called by one rank.

    Kept are the newest `keep_last`, those whose step is a multiple of `keep_every`, and always the newest good one. To know that
    one, the newest is read back and verified whenever there is something to delete (only file work: it may run in a thread).

    Args:
        folder: the run's ``checkpoints`` folder.
        keep_last: number of newest checkpoints kept, at least 1.
        keep_every: checkpoints at multiples of this many steps stay for good; 0 = none do.
        report: receives one line for each damaged checkpoint that was found.

    Returns:
        The deleted steps, newest first.

    Raises:
        OSError: a folder cannot be renamed.
    """
    assert keep_last >= 1, "the newest checkpoint is always kept"
    old = [path for path in list_checkpoints(folder)[keep_last:] if not (keep_every and step_of(path) % keep_every == 0)]
    if not old:
        return []
    try:
        good = newest_good(folder, report)
    except CheckpointError as error:
        report(f"nothing is deleted, a person may still save something: {error}")
        return []
    assert good is not None, "there are checkpoints"
    doomed = [path for path in old if path != good.path]
    for path in doomed:
        discard(path)
    return [step_of(path) for path in doomed]
