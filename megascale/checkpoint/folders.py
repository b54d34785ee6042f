"""Names of checkpoint folders, and the renames that make one appear, be replaced, or go.

- ``step-00000100``: a checkpoint;
- ``step-00000100.partial-<unique>``: being written; never read;
- ``step-00000100.replacement-<unique>``: complete, about to take the place of ``step-00000100``; read in its stead;
- ``step-00000100.trash-<unique>``: being deleted; never read.

A folder is renamed before it is deleted and after it is complete, so a kill at any moment leaves nothing half there.
One run writes to a folder at a time. Should an older writer still be alive, its save fails, because its partial folder is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from megascale.checkpoint.files import sync_folder

READABLE = re.compile(r"step-(\d{8,})(\.replacement-[0-9a-f]{32})?")
LEFTOVER = re.compile(r"step-\d{8,}\.(partial|trash)-[0-9a-f]{32}")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = READABLE.fullmatch(path.name)
    assert match, f"{path} is not the name of a checkpoint"
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a folder, damaged ones included, newest step first; a replacement precedes what it replaces."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if READABLE.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def start(folder: Path, step: int) -> Path:
    """Make the partial folder in which the checkpoint of a step is built."""
    path = _unique(step_folder(folder, step), "partial")
    path.mkdir()
    return path


def publish(partial: Path) -> Path:
    """Turn a complete, synced partial folder into the checkpoint of its step, replacing an earlier one; returns its path."""
    folder, final = partial.parent, partial.with_name(partial.name.partition(".")[0])
    if final.exists():
        # A folder with files in it cannot be replaced by one rename. The first of the two makes the new one count.
        replacement = _unique(final, "replacement")
        os.rename(partial, replacement)
        sync_folder(folder)
        _finish_replacement(replacement)
    else:
        os.rename(partial, final)
    sync_folder(folder)
    return final


def discard(path: Path) -> None:
    """Delete a checkpoint folder: at once for readers, then its files."""
    trash = _unique(path.with_name(path.name.partition(".")[0]), "trash")
    os.rename(path, trash)
    sync_folder(path.parent)
    # What cannot be deleted now (network file systems keep files that are open elsewhere) is collected by the next tidy.
    shutil.rmtree(trash, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Finish what killed writers left: complete replacements take their place, partial folders and trash go."""
    for path in sorted(folder.iterdir()):
        match = READABLE.fullmatch(path.name)
        if match and match[2]:
            _finish_replacement(path)
        elif LEFTOVER.fullmatch(path.name):
            discard(path)


def _finish_replacement(replacement: Path) -> None:
    final = step_folder(replacement.parent, step_of(replacement))
    if final.exists():
        discard(final)
    os.rename(replacement, final)
    sync_folder(final.parent)


def _unique(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{uuid.uuid4().hex}")
