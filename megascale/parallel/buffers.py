"""The model's state that no optimizer trains (router biases, hash tables) in checkpoints. All ranks of a stage hold the same."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor, nn

from megascale.checkpoint.layout import Rectangle, full
from megascale.checkpoint.tensors import Tensors
from megascale.checkpoint.weights import BUFFERS
from megascale.model.decoder import Decoder
from megascale.parallel.mesh import STAGE, Mesh


def buffer_rectangles(decoders: Mapping[int, Decoder], mesh: Mesh) -> Iterator[Rectangle]:
    """What this rank writes into a checkpoint: the first rank of each stage writes all of its buffers."""
    if mesh.along(*STAGE)[0] != mesh.world.rank:
        return
    for decoder in decoders.values():
        for name, buffer in decoder.named_buffers():
            yield full(BUFFERS + name, buffer)


def read_buffers(decoder: nn.Module, reader: Tensors) -> dict[str, Tensor]:
    """The saved buffers of a decoder or stage, by name.

    Raises:
        CheckpointError: one is missing.
    """
    return {name: reader.read(BUFFERS + name) for name, _ in decoder.named_buffers()}


@torch.no_grad()
def load_buffers(decoders: Mapping[int, Decoder], reader: Tensors, only: Container[str] | None = None) -> None:
    """Restore what `buffer_rectangles` wrote, in any layout: all of it, or `only` these names."""
    for decoder in decoders.values():
        for name, buffer in decoder.named_buffers():
            if only is None or BUFFERS + name in only:
                buffer.copy_(reader.read(BUFFERS + name))
