"""A set of streams beside a frozen trunk: prefixes and aggregator of one P, without the trunk (arXiv 2505.10475, section 4.2).

A folder with streams.safetensors (our names, our order of columns, fp32) and streams.json (settings, digests of the trunk and the file).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.files import FileRecord, digest_file, encode_json, write_file
from megascale.checkpoint.hugging_face.side_files import new_folder
from megascale.checkpoint.shard import header, tensor_bytes
from megascale.config.schema import Streams

FORMAT = 1
DESCRIPTION = "streams.json"
TENSORS = "streams.safetensors"
_REMEDY = "save the set again: megascale streams save RUN FOLDER"


@dataclass(frozen=True)
class StreamSet:
    """Prefixes and aggregator of one P.

    Attributes:
        place: where it was read from, for messages.
        streams: their settings.
        trunk: digest of the weights beside which they were trained (see `weights_digest`).
        tensors: by parameter name, fp32.
        origin: run and step that they come from.
    """

    place: str
    streams: Streams
    trunk: str
    tensors: Mapping[str, Tensor]
    origin: Mapping[str, Any]


def write_set(found: StreamSet, target: Path) -> FileRecord:
    """Write a set into a new folder, which appears when it is complete.

    Raises:
        InputError: the folder exists, or cannot be made.
    """
    names = sorted(found.tensors)
    start = header((name, found.tensors[name].dtype, tuple(found.tensors[name].shape)) for name in names)
    with new_folder(target) as folder:
        chunks = (memoryview(start), *(tensor_bytes(found.tensors[name]) for name in names))
        record = write_file(folder / TENSORS, chunks)
        description = {
            "format": FORMAT,
            "streams": found.streams.model_dump(mode="json"),
            "trunk": found.trunk,
            "tensors": record.digest,
            "origin": dict(found.origin),
        }
        (folder / DESCRIPTION).write_bytes(encode_json(description))
    return record


def is_set(folder: Path) -> bool:
    """Whether a folder holds a set of streams."""
    return (folder / DESCRIPTION).is_file()


def read_set(folder: Path) -> StreamSet:
    """Read a set.

    Raises:
        CheckpointError: a file is missing, damaged or of another format.
    """
    path = folder / DESCRIPTION
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise CheckpointError(str(path), f"has format {values['format']}; this program reads format {FORMAT}", _REMEDY)
        streams = Streams.model_validate_json(json.dumps(values["streams"]))
        trunk, digest, origin = values["trunk"], values["tensors"], values["origin"]
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(path), f"is not a set of streams ({error!r})", _REMEDY) from error
    return StreamSet(str(folder), streams, trunk, _read_tensors(folder / TENSORS, digest), origin)


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        if digest_file(path).digest != digest:
            raise CheckpointError(str(path), "is damaged: its digest is not the one in streams.json", _REMEDY)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", _REMEDY) from error
