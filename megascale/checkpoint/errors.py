"""Errors of this room. Both are `InputError`: they name a place, a reason and a remedy."""

from __future__ import annotations

from megascale.config.errors import InputError


class CheckpointError(InputError):
    """A checkpoint cannot be used: damaged, missing, of another format, or not what the model expects."""


class SaveError(CheckpointError):
    """A checkpoint could not be written. Raised alike on every rank; older checkpoints are untouched."""

    exit_code = 1
