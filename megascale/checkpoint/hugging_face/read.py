"""A Hugging Face folder read as a checkpoint of ours: rectangles of our tensors, under our names, in our dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from megascale.checkpoint.hugging_face.folder import HuggingFaceModel
from megascale.checkpoint.hugging_face.tensors import Piece
from megascale.checkpoint.layout import Shape, overlap, region


class HuggingFaceTensors:
    """See `megascale.checkpoint.tensors.Tensors`. Of a piece that several ranks share, each reads its own rectangle only."""

    def __init__(self, source: HuggingFaceModel):
        self.source, self.path = source, source.folder
        self.pieces: dict[str, list[Piece]] = {}
        for piece in source.pieces:
            self.pieces.setdefault(piece.stored, []).append(piece)

    def names(self) -> list[str]:
        """See `Tensors`."""
        return sorted(self.pieces)

    def shape(self, name: str) -> Shape:
        """See `Tensors`."""
        return self.pieces[name][0].shape

    def read(self, name: str, offsets: Shape | None = None, sizes: Shape | None = None) -> Tensor:
        """See `Tensors`; floats are fp32.

        Raises:
            InputError: a file has changed or cannot be read.
        """
        pieces = self.pieces[name]
        shape = pieces[0].shape
        offsets = (0,) * len(shape) if offsets is None else offsets
        sizes = tuple(extent - offset for extent, offset in zip(shape, offsets, strict=True)) if sizes is None else sizes
        if sizes == pieces[0].sizes == shape:
            return self.source.read(pieces[0])
        result = torch.empty(sizes, dtype=pieces[0].dtype)
        for piece in pieces:
            shared = overlap(offsets, sizes, piece.offsets, piece.sizes)
            if shared is not None:
                result[region(_minus(shared[0], offsets), shared[1])] = self._part(piece, *shared)
        return result

    def _part(self, piece: Piece, offsets: Shape, sizes: Shape) -> Tensor:
        here = region(_minus(offsets, piece.offsets), sizes)
        if piece.reordered or sizes == piece.sizes:
            return self.source.read(piece)[here]
        # one expert of ours is a tensor of theirs without the first dimension
        theirs = here[len(piece.sizes) - len(piece.their_shape) :]
        return self.source.files.read(piece.theirs, theirs).to(piece.dtype).view(sizes)


def _minus(a: Shape, b: Shape) -> Shape:
    return tuple(one - other for one, other in zip(a, b, strict=True))
