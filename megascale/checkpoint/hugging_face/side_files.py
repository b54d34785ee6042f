"""What lies beside the weights of a Hugging Face model and is kept with the run: config, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megascale.checkpoint.hugging_face.folder import CONFIG, TOKENIZER
from megascale.config.errors import InputError

KEPT = "hugging_face"
"""Folder inside an imported run."""
TOKENIZER_CONFIG = "tokenizer_config.json"

_TEXT_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def keep(source: Path, run_folder: Path) -> None:
    """Copy config.json and the files of the tokenizer into a run folder, over those that a start which failed has left there."""
    (run_folder / KEPT).mkdir(exist_ok=True)
    for name in (CONFIG, *_TEXT_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, run_folder / KEPT / name)


def kept_config(run_folder: Path) -> dict[str, Any] | None:
    """config.json that an imported run came with; none for other runs.

    Raises:
        InputError: it is damaged.
    """
    path = run_folder / KEPT / CONFIG
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            str(path), f"is damaged: {error}", "delete it: the export then follows from config.yaml alone"
        ) from error


def give_back(run_folder: Path, target: Path) -> list[str]:
    """Copy the kept files of the tokenizer to an exported folder; returns their names."""
    found = [name for name in _TEXT_FILES if (run_folder / KEPT / name).is_file()]
    for name in found:
        shutil.copyfile(run_folder / KEPT / name, target / name)
    return found


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and not at all otherwise.

    Raises:
        InputError: there is such a folder, or it cannot be made.
    """
    if target.exists():
        raise InputError(str(target), "exists already", "give the name of a new folder")
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(str(target), f"cannot be made: {error.strerror}", "give a folder that you may write") from error
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
