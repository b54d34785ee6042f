"""The folder of a run: runs/NAME with config.yaml, manifest.json, metrics.jsonl, exit.json, logs/, checkpoints/."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import megascale
from megascale.checkpoint.folders import list_checkpoints, step_of
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
    if imported and span_at(earlier, 0).config.model == span_at(config, 0).config.model:
        kept.write_text(dump(config))
        return folder
    if imported or digest(earlier) != digest(config):
        changes = "; ".join(
            f"{path}: {a!r} -> {b!r}"
            for path, a, b in difference(earlier, config)
            if not path.startswith(UNTRAINED) and (path.startswith("model.") or not imported)
        )
        raise InputError(
            f"run folder {folder}",
            f"holds a run of another config ({changes})",
            "choose another run.name=NAME, or delete the folder",
        )
    return folder


def _has_trained(folder: Path) -> bool:
    """Whether a step was recorded or saved; a start that failed before that binds the folder to nothing."""
    metrics = folder / "metrics.jsonl"
    return any((folder / "checkpoints").iterdir()) or (metrics.exists() and metrics.stat().st_size > 0)


def _only_imported(folder: Path) -> bool:
    """Whether all there is are imported weights, the checkpoint of step 0: they fit any training of their model."""
    found = list_checkpoints(folder / "checkpoints")
    metrics = folder / "metrics.jsonl"
    return bool(found) and step_of(found[0]) == 0 and not (metrics.exists() and metrics.stat().st_size > 0)


UNTRAINED = ("run.name", "run.folder", "observe.", "checkpoint.", "profile.", "guard.", "compile", "parallel.", "engine.")
"""Settings that may change between a start and its resume."""


def write_manifest(folder: Path, **facts: Any) -> None:
    """What the run was made with: versions, host and the given facts (data digest, parameters, world)."""
    versions = {"megascale": megascale.__version__, "torch": torch.__version__, "python": platform.python_version()}
    record = {"versions": versions, "host": platform.node(), **facts}
    (folder / "manifest.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
