"""Files that a verb writes where its user asked for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megascale.config.errors import InputError


def save(path: Path, text: str, option: str) -> None:
    """Write a text file and say so on stderr.

    Raises:
        InputError: it cannot be written; names the option.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(option, f"{path} cannot be written: {error.strerror}", "choose another file") from error
    print(f"wrote {path}", file=sys.stderr)


def check_writable(path: Path, option: str) -> None:
    """InputError, as `save` would raise it, before a verb starts what takes long. Leaves no file behind."""
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission"
    if reason is not None:
        raise InputError(option, f"{path} cannot be written: {reason}", "choose another file")
