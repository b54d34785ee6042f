"""Weights as anyone may read them, whatever holds them, and their digest, which does not depend on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from megascale.checkpoint.layout import Shape, volume
from megascale.checkpoint.shard import tensor_bytes
from megascale.config.schema import Model

WEIGHTS = "model/"
"""What the names of a checkpoint's weights start with; the rest is optimizer state."""
BUFFERS = "buffer/"
"""What the names of state start with that no optimizer trains (router biases, hash tables)."""

ORIGIN = "start"
"""Entry of a checkpoint's state: where the run's first weights came from."""
BLOCK = 2**24
"""Elements read at a time for a digest: 64 MiB of fp32."""


class Tensors(Protocol):
    """Named tensors of which any rectangle can be read: a checkpoint, or another model in its place."""

    path: Path

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> Shape:
        """Global shape of a tensor."""

    def read(self, name: str, offsets: Shape | None = None, sizes: Shape | None = None) -> torch.Tensor:
        """A rectangle of a tensor; by default the whole tensor."""


def weights_digest(tensors: Tensors, names: Iterable[str]) -> str:
    """xxh3-128 of the named tensors: names, shapes and fp32 values.

    The same weights have the same digest in a checkpoint of any layout and in a Hugging Face folder of any dtype that holds them.
    A block of rows is in memory at a time.
    """
    total = xxhash.xxh3_128()
    for name in sorted(names):
        shape = tensors.shape(name)
        total.update(f"{name}{list(shape)}".encode())
        rows = shape[0] if shape else 1
        step = max(1, BLOCK * rows // max(volume(shape), 1))
        for first in range(0, rows, step):
            offsets = (first, *(0,) * (len(shape) - 1)) if shape else ()
            sizes = (min(step, rows - first), *shape[1:]) if shape else ()
            total.update(tensor_bytes(_exact(tensors.read(name, offsets, sizes))))
    return total.hexdigest()


def origin_record(path: Path, step: int | None, model: Model, tensors: Tensors) -> dict[str, Any]:
    """What a run keeps of the model that its first weights came from. Reads all of them, for the digest."""
    names = [name for name in tensors.names() if name.startswith((WEIGHTS, BUFFERS))]
    return {"path": str(path), "step": step, "digest": weights_digest(tensors, names), "model": model.model_dump(mode="json")}


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
