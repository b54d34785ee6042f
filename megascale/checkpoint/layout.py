"""What a rank holds of a global tensor: a rectangle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

Shape = tuple[int, ...]

SAFETENSORS_CODE: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_CODE}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in index.json, for example ``float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Rectangle:
    """A piece of a global tensor.

    Attributes:
        name: global name, for example ``model/layers.0.attention.q.weight`` or ``adamw.exp_avg/norm.weight``.
        global_shape: shape of the whole tensor; ``()`` for a scalar.
        offsets: where the piece starts, one offset for each dimension of the whole tensor.
        tensor: the piece, with as many dimensions as the whole tensor, on any device.
    """

    name: str
    global_shape: Shape
    offsets: Shape
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        assert self.name, "a rectangle needs a name"
        assert len(self.global_shape) == len(self.offsets) == self.tensor.dim(), f"{self.name}: dimensions differ"
        for size, offset, extent in zip(self.tensor.shape, self.offsets, self.global_shape, strict=True):
            assert offset >= 0 and offset + size <= extent, f"{self.name}: piece outside the global shape {self.global_shape}"
        assert self.tensor.dtype in SAFETENSORS_CODE, f"{self.name}: dtype {self.tensor.dtype} cannot be stored"

    @property
    def sizes(self) -> Shape:
        """Shape of the piece."""
        return tuple(self.tensor.shape)

    def values(self) -> torch.Tensor:
        """The piece with its elements; asked for once, when they are written."""
        return self.tensor


@dataclass(frozen=True)
class Deferred(Rectangle):
    """A rectangle whose elements are read when they are written, so that a whole model never has to be in memory.

    Attributes:
        tensor: on the meta device: shape and dtype only.
        read: gives the elements; called once.
    """

    read: Callable[[], torch.Tensor]

    def values(self) -> torch.Tensor:
        tensor = self.read()
        assert (tensor.shape, tensor.dtype) == (self.tensor.shape, self.tensor.dtype), f"{self.name}: not what was declared"
        return tensor


def full(name: str, tensor: torch.Tensor) -> Rectangle:
    """The rectangle of a tensor that this rank holds as a whole."""
    return Rectangle(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def volume(sizes: Shape) -> int:
    """Number of elements; 1 for a scalar."""
    return prod(sizes)


def overlap(offsets_a: Shape, sizes_a: Shape, offsets_b: Shape, sizes_b: Shape) -> tuple[Shape, Shape] | None:
    """Offsets and sizes of what two rectangles share; None when they share no element."""
    starts = tuple(max(a, b) for a, b in zip(offsets_a, offsets_b, strict=True))
    ends = tuple(min(a + m, b + n) for a, m, b, n in zip(offsets_a, sizes_a, offsets_b, sizes_b, strict=True))
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        return None
    return starts, tuple(end - start for start, end in zip(starts, ends, strict=True))


def region(offsets: Shape, sizes: Shape) -> tuple[slice, ...]:
    """The rectangle as slices."""
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
