"""Reads a checkpoint of a run with `model.streams.reparameterise` as one of the plain model: the networks that made the prefixes are folded
into what they make (arXiv 2101.00190, section 4.3: "once training is complete, these reparametrization parameters can be dropped").
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from megascale.checkpoint.layout import Shape
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.weights import WEIGHTS
from megascale.config.schema import Model
from megascale.model.streams import PrefixNetwork

_NETWORK = re.compile(r"model/(layers\.\d+\.attention)\.prefix_network\.(.+)")
_PREFIX = re.compile(r"model/(layers\.\d+\.attention)\.prefix_([kv])")


class FoldedReader(CheckpointReader):
    """The checkpoint of `reader`, whose weights are those of the model without networks. Closing one closes both."""

    def __init__(self, reader: CheckpointReader, model: Model):
        super().__init__(reader.path)
        self._open = reader._open
        self._prefixes = lru_cache(maxsize=1)(self._make)
        self.model = model
        assert model.kv_heads is not None and model.head_dim is not None
        self.prefix_shape = (model.streams.count, model.kv_heads, model.streams.prefix_tokens, model.head_dim)

    def names(self) -> list[str]:
        """See `CheckpointReader`; state of the optimizer is left out."""
        plain = {name for name in super().names() if ".prefix_network." not in name}
        layers = {found[1] for name in super().names() if (found := _NETWORK.fullmatch(name))}
        return sorted(plain | {f"{WEIGHTS}{layer}.prefix_{x}" for layer in layers for x in "kv"})

    def shape(self, name: str) -> Shape:
        """See `CheckpointReader`."""
        return self.prefix_shape if _PREFIX.fullmatch(name) else super().shape(name)

    def read(self, name: str, offsets: Shape | None = None, sizes: Shape | None = None) -> torch.Tensor:
        """See `CheckpointReader`."""
        prefix = _PREFIX.fullmatch(name)
        if prefix is None:
            return super().read(name, offsets, sizes)
        whole = self._prefixes(prefix[1])["kv".index(prefix[2])]
        starts = offsets or (0,) * whole.ndim
        stops = sizes or tuple(size - start for size, start in zip(whole.shape, starts, strict=True))
        return whole[tuple(slice(start, start + size) for start, size in zip(starts, stops, strict=True))].contiguous()

    @torch.no_grad()
    def _make(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.device("meta"):
            network = PrefixNetwork(self.model)
        weights = {
            name: super(FoldedReader, self).read(f"{WEIGHTS}{layer}.prefix_network.{name}") for name in network.state_dict()
        }
        network.load_state_dict(weights, assign=True)
        return network()


def folded(reader: CheckpointReader, model: Model) -> tuple[CheckpointReader, Model]:
    """A checkpoint and its model as evaluation and export want them: with prefixes, whatever made them."""
    if model.streams.reparameterise is None:
        return reader, model
    streams = model.streams.model_copy(update={"reparameterise": None})
    return FoldedReader(reader, model), model.model_copy(update={"streams": streams})
