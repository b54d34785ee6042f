"""One rank's safetensors file.

The file is written here, and not by `safetensors.save_file`, for three reasons: tensors leave the accelerator one by one
(save_file wants all of them in host memory), the digest is taken of the bytes in memory on their way out, and a full disk is an
ordinary OSError. The safetensors library reads the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from megascale.checkpoint.files import FileRecord, write_file
from megascale.checkpoint.index import Index, Placement, TensorEntry
from megascale.checkpoint.layout import SAFETENSORS_CODE, Rectangle, Shape, dtype_name, volume


def shard_name(rank: int) -> str:
    """Plain name of the file that a rank writes."""
    return f"shard-{rank:05d}.safetensors"


class Shard:
    """The plan of a shard: what lies where in the file, known before a byte is written.

    Attributes:
        file: its plain name, ``shard-00003.safetensors`` for rank 3.
        size: bytes of the file; 0 when there is nothing to write, and then there is no file.
        index: this rank's part of the index.
    """

    def __init__(self, rank: int, rectangles: Iterable[Rectangle]):
        self.file = shard_name(rank)
        self.index: Index = {}
        keyed: list[tuple[str, Rectangle]] = []
        for rectangle in rectangles:
            # An empty piece is declared, so that its tensor is known, but holds nothing to store.
            stored = volume(rectangle.sizes) > 0
            key = _key(rectangle)
            placements = (Placement(self.file, key, rectangle.offsets, rectangle.sizes),) if stored else ()
            known = self.index.get(rectangle.name)
            entry = TensorEntry(rectangle.global_shape, dtype_name(rectangle.tensor.dtype), placements)
            if known is not None:
                assert (known.shape, known.dtype) == (entry.shape, entry.dtype), f"{rectangle.name}: pieces of different tensors"
                assert all(key != other.key for other in known.rectangles), f"{rectangle.name}: the same piece twice"
                entry = TensorEntry(known.shape, known.dtype, known.rectangles + placements)
            self.index[rectangle.name] = entry
            if stored:
                keyed.append((key, rectangle))
        # Widest elements first: every tensor then starts at a multiple of its element size, which mapped reading wants.
        self._keyed = sorted(keyed, key=lambda pair: -pair[1].tensor.element_size())
        self._header = header((key, one.tensor.dtype, one.sizes) for key, one in self._keyed)
        self.size = len(self._header) + sum(one.tensor.nbytes for _, one in self._keyed) if self._keyed else 0

    def write(self, folder: Path) -> FileRecord:
        """Write the file into a folder.

        Raises:
            OSError: the file exists, or cannot be written (a full disk).
        """
        return write_file(folder / self.file, self._chunks())

    def _chunks(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for _, rectangle in self._keyed:
            yield tensor_bytes(rectangle.values())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy when it is contiguous and in host memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _key(rectangle: Rectangle) -> str:
    """A whole tensor keeps its name, so that any safetensors reader finds it; a piece says which one it is."""
    if rectangle.sizes == rectangle.global_shape:
        return rectangle.name
    ranges = ",".join(f"{offset}:{offset + size}" for offset, size in zip(rectangle.offsets, rectangle.sizes, strict=True))
    return f"{rectangle.name}[{ranges}]"


def header(tensors: Iterable[tuple[str, torch.dtype, Shape]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The start of a safetensors file: length (8 bytes, little endian) and JSON description of all tensors, padded with blanks.

    Args:
        tensors: key, dtype and shape of each, in the order in which their bytes follow.
        metadata: texts stored with them.
    """
    description: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key, dtype, shape in tensors:
        end = start + volume(shape) * dtype.itemsize
        description[key] = {"dtype": SAFETENSORS_CODE[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(description, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
