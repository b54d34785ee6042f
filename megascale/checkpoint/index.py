"""index.json: for each global tensor its shape, its dtype, and the file that holds each of its rectangles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.layout import Shape, overlap, volume

INDEX = "index.json"


@dataclass(frozen=True)
class Placement:
    """Where a stored rectangle is: file, key in that safetensors file, and its place in the global tensor."""

    file: str
    key: str
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True)
class TensorEntry:
    """A global tensor: shape, dtype name (``float32``), and the rectangles that make it up."""

    shape: Shape
    dtype: str
    rectangles: tuple[Placement, ...]


Index = dict[str, TensorEntry]


def merge(parts: Iterable[Mapping[str, TensorEntry]]) -> Index:
    """One index from the parts of all ranks.

    Raises:
        CheckpointError: two ranks disagree about a tensor, or its rectangles leave a hole or overlap; names the tensor.
    """
    first: Index = {}
    placements: dict[str, list[Placement]] = {}
    for part in parts:
        for name, entry in part.items():
            known = first.setdefault(name, entry)
            if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                reason = f"one rank says {known.dtype} {known.shape}, another {entry.dtype} {entry.shape}"
                raise CheckpointError(f"tensor {name}", reason)
            placements.setdefault(name, []).extend(entry.rectangles)
    index = {name: TensorEntry(entry.shape, entry.dtype, tuple(placements[name])) for name, entry in sorted(first.items())}
    for name, entry in index.items():
        check_tiling(name, entry)
    return index


def check_tiling(name: str, entry: TensorEntry) -> None:
    """Check that the rectangles of a tensor cover each of its elements exactly once.

    Raises:
        CheckpointError: two rectangles overlap, or elements are missing; names the tensor.
    """
    if entry.shape:
        _check_overlaps(name, entry)
    held, wanted = sum(volume(placement.sizes) for placement in entry.rectangles), volume(entry.shape)
    if held != wanted:
        reason = f"{held} elements were given, shape {entry.shape} has {wanted}"
        raise CheckpointError(f"tensor {name}", reason, "each element has to be written by exactly one rank")


def _check_overlaps(name: str, entry: TensorEntry) -> None:
    """Sweep along the axis with the most cuts: a rectangle can only overlap those that have not ended where it starts."""
    axis = max(range(len(entry.shape)), key=lambda one: len({placement.offsets[one] for placement in entry.rectangles}))
    active: list[Placement] = []
    for placement in sorted(entry.rectangles, key=lambda one: one.offsets[axis]):
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > placement.offsets[axis]]
        for other in active:
            if overlap(placement.offsets, placement.sizes, other.offsets, other.sizes):
                reason = f"{other.file} {other.key} and {placement.file} {placement.key} hold the same elements"
                raise CheckpointError(f"tensor {name}", reason, "each element has to be written by exactly one rank")
        active.append(placement)


def to_json(index: Index) -> dict[str, object]:
    """The content of index.json."""
    return {"tensors": {name: asdict(entry) for name, entry in index.items()}}


def from_json(content: dict) -> Index:
    """An index from the content of index.json.

    Raises:
        KeyError, TypeError: the content is not an index.
    """
    return {
        name: TensorEntry(
            tuple(entry["shape"]),
            entry["dtype"],
            tuple(Placement(one["file"], one["key"], tuple(one["offsets"]), tuple(one["sizes"])) for one in entry["rectangles"]),
        )
        for name, entry in content["tensors"].items()
    }
