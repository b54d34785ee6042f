"""Safetensors files of a Hugging Face folder: read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascale.checkpoint.files import encode_json, write_file
from megascale.checkpoint.layout import SAFETENSORS_CODE, Shape, volume
from megascale.checkpoint.shard import header, tensor_bytes
from megascale.config.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DAMAGED = "download it again, or restore it from a copy"

_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODE.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as the file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: Shape


class TensorFiles:
    """The tensors of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` lists.

    Raises:
        InputError: no such files, a file that is missing, truncated or no safetensors file, files and index that disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        if (folder / SINGLE).exists():  # transformers looks for this one first too
            self._add(folder / SINGLE)
            return
        if not (folder / INDEX).exists():
            pickled = next(iter(sorted(folder.glob("*.bin"))), None)
            found = f"only {pickled.name}, a pickle, which can run code when it is read" if pickled is not None else "no weights"
            raise InputError(str(folder), f"has neither {SINGLE} nor {INDEX}: {found}", "give a folder with safetensors files")
        listed = self._read_index()
        for name in sorted(set(listed.values())):
            if Path(name).name != name:
                raise InputError(str(folder / INDEX), f"lists {name!r}, which is not a plain file name", "do not use this model")
            self._add(folder / name)
        for name, file in listed.items():
            if name not in self.stored or self.stored[name].file.name != file:
                raise InputError(str(folder / file), f"lacks the tensor {name}, which {INDEX} promises", DAMAGED)
        unlisted = self.stored.keys() - listed.keys()
        if unlisted:
            name = min(unlisted)
            raise InputError(str(self.stored[name].file), f"holds the tensor {name}, which {INDEX} does not list", DAMAGED)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(str(path), f"is not an index of weights ({error!r})", DAMAGED) from error
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise InputError(str(path), "its weight_map is not a table of tensors and files", DAMAGED)
        return listed

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(str(path), f"is missing; {INDEX} lists it", DAMAGED)
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in self.stored:
                    raise InputError(str(path), f"holds the tensor {name}, as {self.stored[name].file.name} does", DAMAGED)
                piece = file.get_slice(name)
                if piece.get_dtype() not in _DTYPES:
                    raise InputError(str(path), f"tensor {name} has the dtype {piece.get_dtype()}", "not supported")
                self.stored[name] = Stored(path, _DTYPES[piece.get_dtype()], tuple(piece.get_shape()))

    def read(self, name: str, part: slice | tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, some of its rows, or a rectangle of it, in the stored dtype.

        The file is opened anew for every tensor: what was mapped for the one before is given back.

        Raises:
            InputError: the file has changed or cannot be read.
        """
        path = self.stored[name].file
        with _opened(path) as file:
            try:
                return file.get_tensor(name) if part is None else file.get_slice(name)[part]
            except (SafetensorError, OSError) as error:
                raise InputError(str(path), f"tensor {name} cannot be read ({error})", DAMAGED) from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = f"cannot be read as a safetensors file of {path.stat().st_size:,} bytes: truncated or damaged ({error})"
        raise InputError(str(path), reason, DAMAGED) from error


@dataclass(frozen=True)
class Planned:
    """A tensor to write; `read` gives its elements when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return volume(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Iterable[Planned], largest: int) -> list[str]:
    """Write tensors as one file, or as several with an index; returns the files' names.

    Args:
        largest: bytes of a file, unless a single tensor has more.

    Raises:
        OSError: a file cannot be written.
    """
    shards = list(_shards(tensors, largest))
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return [SINGLE]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard)
    listed = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
    total = sum(one.size for shard in shards for one in shard)
    (folder / INDEX).write_bytes(encode_json({"metadata": {"total_size": total}, "weight_map": listed}, indent=2))
    return names


def _shards(tensors: Iterable[Planned], largest: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    size = 0
    for one in tensors:
        if shard and size + one.size > largest:
            yield shard
            shard, size = [], 0
        shard.append(one)
        size += one.size
    yield shard


def _write(path: Path, shard: list[Planned]) -> None:
    # Widest elements first, as the library does: every tensor starts at a multiple of its element size.
    shard = sorted(shard, key=lambda one: -one.dtype.itemsize)

    def chunks() -> Iterator[memoryview]:
        yield memoryview(header(((one.name, one.dtype, one.shape) for one in shard), {"format": "pt"}))
        for one in shard:
            tensor = one.read()
            assert (tuple(tensor.shape), tensor.dtype) == (one.shape, one.dtype), f"{one.name}: not what was planned"
            yield tensor_bytes(tensor)

    write_file(path, chunks())
