"""The folder of a run: runs/NAME with config.yaml, manifest.json, metrics.jsonl, exit.json, logs/, checkpoints/."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import megascale
from megascale.checkpoint.hugging_face.import_folder import is_import
from megascale.checkpoint.hugging_face.settings import essential
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.phases import span_at
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.config.write import difference, digest, dump


def open_run_folder(config: Config) -> Path:
    """Create the folder, or check that the one that exists belongs to this config (a folder in which no step was trained fits any).

    Raises:
        InputError: the folder cannot be written, or holds a run of another config.
    """
    folder = Path(config.run.folder) / config.run.name
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        probe = folder / f".write-probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"run folder {folder}", f"cannot be written: {error.strerror}", "choose another run.folder=PATH"
        ) from error
    kept = folder / "config.yaml"
    if not kept.exists() or not _has_trained(folder):
        kept.write_text(dump(config))
        return folder
    earlier = resolve(load_config(kept).config)
    imported = _only_imported(folder)
    if imported and config.start.model is not None:
        reason = "holds imported weights already, which the training would begin with"
        raise InputError(f"run folder {folder}", reason, "leave start.model out, or choose another run.name=NAME")
    before, model = (essential(span_at(one, 0).config.model) for one in (earlier, config))
    if imported and before == model:
        kept.write_text(dump(config))
        return folder
    if imported or digest(earlier) != digest(config):
        rows = difference(Config(model=before), Config(model=model)) if imported else difference(earlier, config)
        changes = "; ".join(f"{path}: {a!r} -> {b!r}" for path, a, b in rows if not path.startswith(UNTRAINED))
        again = f"choose another run.name=NAME with start.model={folder}" if imported else "choose another run.name=NAME"
        raise InputError(f"run folder {folder}", f"holds a run of another config ({changes})", f"{again}, or delete the folder")
    return folder


def _has_trained(folder: Path) -> bool:
    """Whether a step was recorded or saved; a start that failed before that binds the folder to nothing."""
    metrics = folder / "metrics.jsonl"
    return any((folder / "checkpoints").iterdir()) or (metrics.exists() and metrics.stat().st_size > 0)


def _only_imported(folder: Path) -> bool:
    """Whether all there is are imported weights: they fit any training of their model."""
    metrics = folder / "metrics.jsonl"
    return is_import(folder) and not (metrics.exists() and metrics.stat().st_size > 0)


UNTRAINED = (
    "run.name",
    "run.folder",
    "observe.",
    "checkpoint.",
    "profile.",
    "guard.",
    "compile",
    "kernels",
    "parallel.",
    "engine.",
)
"""Settings that may change between a start and its resume."""


def write_manifest(folder: Path, **facts: Any) -> None:
    """What the run was made with: versions, host and the given facts (data digest, parameters, world)."""
    versions = {"megascale": megascale.__version__, "torch": torch.__version__, "python": platform.python_version()}
    record = {"versions": versions, "host": platform.node(), **facts}
    (folder / "manifest.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
