"""Which piece of which of our tensors each tensor of a Hugging Face file is. d width, P streams, E experts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megascale.checkpoint.hugging_face.families import Family
from megascale.checkpoint.layout import Shape
from megascale.checkpoint.weights import BUFFERS, WEIGHTS
from megascale.config.errors import InputError
from megascale.config.schema import Model
from megascale.model.decoder import Decoder

HIDDEN_MAJOR = "aggregator.hidden.weight"
"""Its columns are stream-major here (p*d + j) and hidden-major there (j*P + p)."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of one of our tensors, and the tensor of theirs that holds it.

    Attributes:
        ours, shape: name and shape of our tensor.
        dtype: of the values that we keep: fp32, or that of a buffer.
        trained: whether it is a parameter; else it is a buffer of a router.
        offsets, sizes: the rectangle.
        theirs, their_shape: name and shape of their tensor.
        streams: P.
    """

    ours: str
    shape: Shape
    dtype: torch.dtype
    trained: bool
    offsets: Shape
    sizes: Shape
    theirs: str
    their_shape: Shape
    streams: int

    @property
    def stored(self) -> str:
        """Its name in our checkpoints."""
        return (WEIGHTS if self.trained else BUFFERS) + self.ours

    @property
    def whole(self) -> bool:
        """Whether the rectangle is all of our tensor."""
        return self.sizes == self.shape

    @property
    def reordered(self) -> bool:
        """Whether a rectangle of ours is not one of theirs."""
        return self.ours == HIDDEN_MAJOR

    def to_ours(self, tensor: Tensor) -> Tensor:
        """Their tensor as our rectangle, of shape `sizes`; a view where the order is the same."""
        if self.reordered:
            tensor = tensor.unflatten(1, (-1, self.streams)).transpose(1, 2).flatten(1)
        return tensor.view(self.sizes)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The reverse of `to_ours`."""
        if self.reordered:
            tensor = tensor.unflatten(1, (self.streams, -1)).transpose(1, 2).flatten(1)
        return tensor.view(self.their_shape)


def parameter_shapes(model: Model) -> dict[str, Shape]:
    """Names and shapes of the parameters of a resolved config; a tied head is the embedding and not listed."""
    return {name: tuple(parameter.shape) for name, parameter in _on_meta(model).named_parameters()}


def _on_meta(model: Model) -> Decoder:
    with torch.device("meta"):
        return Decoder(model)


def pieces_of(family: Family, model: Model) -> list[Piece]:
    """All tensors of a model in a family's format, in the order of our parameters, then of our buffers.

    Raises:
        InputError: the family has no name for one of them.
    """
    decoder = _on_meta(model)
    tensors: list[tuple[str, Tensor]] = [*decoder.named_parameters(), *decoder.named_buffers()]
    return [piece for name, tensor in tensors for piece in _pieces(family, model.streams.count, name, tensor)]


def _pieces(family: Family, streams: int, name: str, tensor: Tensor) -> list[Piece]:
    layer = re.match(r"layers\.(\d+)\.", name)
    pattern = re.sub(r"^layers\.\d+\.", "layers.{layer}.", name)
    if pattern not in family.tensors:
        reason = f"the tensor {name} has no name in the {family.model_type} format"
        raise InputError("megascale convert", reason, "this composition cannot be converted yet")
    theirs = family.tensors[pattern].replace("{layer}", layer[1] if layer else "")
    shape, trained = tuple(tensor.shape), isinstance(tensor, nn.Parameter)
    if "{expert}" not in theirs:
        return [Piece(name, shape, tensor.dtype, trained, (0,) * len(shape), shape, theirs, shape, streams)]
    found = []
    for expert in range(shape[0]):
        offsets, sizes, their_name = (expert, *(0,) * (len(shape) - 1)), (1, *shape[1:]), theirs.replace("{expert}", str(expert))
        found.append(Piece(name, shape, tensor.dtype, trained, offsets, sizes, their_name, shape[1:], streams))
    return found
