"""The residual of a layer: the plain one, K blocks (AltUp), or every k-th token (Sequence-AltUp), behind one interface.

T tokens, P streams, K blocks, d width. Between layers the state is [T, P, K, d]; inside a layer it
is seen in parts, views of it. Every residual answers

    split(state)                                    what the others take of the state
    read(parts, packing)                            what the layer computes on
    combine(attended, attention, feed_forward)      the layer's update, of what its two halves gave
    residual(parts, update, packing)                the next state

The state may have one stream while the update has P: it is then the same for all of them.
"""

from __future__ import annotations

from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.size import strided_layers
from megascale.model.altup import AltUpResidual, Parts
from megascale.model.attention import Packing
from megascale.model.strided import SequenceResidual


class SingleResidual(nn.Module):
    """The plain residual, K = 1: the update is the next state. All but the sums are views."""

    def split(self, state: Tensor) -> Parts:
        """The only block."""
        return (state.squeeze(2),)

    def read(self, parts: Parts, packing: Packing | None = None) -> Tensor:
        """The only block."""
        return parts[0]

    def combine(self, attended: Tensor, attention: Tensor, feed_forward: Tensor) -> Tensor:
        """(x + attention) + feed-forward."""
        return attended + feed_forward

    def forward(self, parts: Parts, update: Tensor, packing: Packing | None = None) -> Tensor:
        """[T, P, 1, d]."""
        return update.unsqueeze(2)


Residual = SingleResidual | AltUpResidual | SequenceResidual


def computed_block(layer: int, model: Model) -> int:
    """j*, the block that a layer computes on (arXiv 2301.13310, section 3: alternating)."""
    altup = model.altup
    if altup.select == "same":
        return 0
    return (layer // model.experts.every if altup.select == "by_period" else layer) % altup.blocks


def residual_of(model: Model, layer: int) -> Residual:
    """The residual of a layer."""
    if layer in strided_layers(model):
        return SequenceResidual()
    return AltUpResidual(model, computed_block(layer, model)) if model.altup.blocks > 1 else SingleResidual()


def expand(embedding: Tensor, streams: int, model: Model) -> Tensor:
    """The state before the first layer, as a view, the same for every stream (ParScale): of the embedding [T, d] the same for every
    block too (Recycled-AltUp); of one [T, K*d] (the wide form) block after block.
    """
    blocks = model.altup.blocks
    if model.altup.form == "wide":
        return embedding.unflatten(1, (blocks, -1))[:, None].expand(-1, streams, -1, -1)
    return embedding[:, None, None, :].expand(-1, streams, blocks, -1)


def contract(state: Tensor, model: Model) -> Tensor:
    """What the last norm reads: [T, P, d], the sum of the blocks (Recycled-AltUp, arXiv 2301.13310, section 4.1; a view for K = 1), or
    [T, P, K*d], the blocks one after the other (the wide form).
    """
    if model.altup.form == "wide":
        return state.flatten(2)
    return state.squeeze(2) if state.shape[2] == 1 else state.sum(2)
