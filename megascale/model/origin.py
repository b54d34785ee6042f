"""Who each token is: its id, and where it stands in the run. What routers ask that the state does not tell. T tokens, P streams."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megascale.model.exchange import Exchange
from megascale.model.philox import WORD, philox, uniform

MOST_STREAMS = 64


@dataclass(frozen=True)
class Draw:
    """Where the random choices of a micro-batch stand in the run; the same numbers in every layout."""

    seed: int = 0
    step: int = 0
    sample: int = 0
    """number of the micro-batch's first sequence within its step, over all ranks"""


@dataclass(frozen=True)
class Origin:
    """Of the tokens here, in the order of the state."""

    ids: Tensor
    """int64 [T], of the vocabulary"""
    counter: Tensor
    """int64 [T, 3]: step, sample and position in the sequence"""
    key: Tensor
    """int64 [2]: seed and layer"""
    stream: Tensor | None = None
    """int64: the numbers of the streams here, whose tokens go through the layers without the others'; none: all P are here"""

    def at(self, layer: int) -> Origin:
        """For the choices of one layer."""
        return replace(self, key=torch.stack([self.key[0], torch.full_like(self.key[1], layer)]))

    def of_streams(self, numbers: range) -> Origin:
        """For a pass with these streams alone."""
        return replace(self, stream=torch.arange(numbers.start, numbers.stop, device=self.key.device))

    def take(self, tokens: Tensor) -> Origin:
        """Of some of the tokens, by their numbers."""
        return replace(self, ids=self.ids[tokens], counter=self.counter[tokens])

    def draws(self, streams: int, number: int) -> Tensor:
        """Uniform numbers in [0, 1), fp64 [T, P, number], keyed by (seed, step, layer, sample, position, stream, which of them).

        Args:
            streams: how many are here.
            number: of draws for each token and stream.
        """
        stream = torch.arange(streams, device=self.counter.device) if self.stream is None else self.stream
        assert stream.shape == (streams,)
        return _draws(self.counter, self.key, stream, number)


# one op for torch.compile: unrolled, its rounds would take the compiler minutes
@torch.library.custom_op("megascale::draws", mutates_args=())
def _draws(counter: Tensor, key: Tensor, stream: Tensor, number: int) -> Tensor:
    step, sample, position = (x[:, None, None] for x in counter.unbind(1))
    block = torch.arange(-(-number // 4), device=counter.device)
    words = philox((sample, position, step, block * MOST_STREAMS + stream[:, None]), (key[0], key[1]))
    return uniform(torch.stack(torch.broadcast_tensors(*words), -1)).flatten(2)[..., :number].contiguous()


@_draws.register_fake
def _(counter: Tensor, key: Tensor, stream: Tensor, number: int) -> Tensor:
    return counter.new_empty(counter.shape[0], stream.shape[0], number, dtype=torch.float64)


def origin_of(tokens: Tensor, draw: Draw, share_tokens: Exchange) -> Origin:
    """The origin of this rank's share of the tokens [B, S] of a micro-batch."""
    batch, length = tokens.shape
    index = torch.arange(batch * length, device=tokens.device)
    counter = torch.stack([torch.full_like(index, draw.step), index // length + draw.sample, index % length], 1)
    key = torch.stack([index.new_full((), draw.seed & WORD), index.new_zeros(())])
    return Origin(share_tokens(tokens.flatten()), share_tokens(counter), key)
