"""Files that a verb writes where its user asked for them."""

from __future__ import annotations

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
