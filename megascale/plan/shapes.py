"""Decoders of any size by a written rule, for the search over axes: the proportions of Llama 3 (arXiv 2407.21783, table 3).

j counts steps of width 512 and L layers: width 512 j, 4 j heads of width 128 with j key/value heads, feed-forward 3.5 times the width.
L is 4 j, 5 j or 6 j. The embedding is the head up to width 3072, as in Llama 3.2. Experts, where there are some, stand in every other layer
(R = 1/2 of arXiv 2202.01169), each as wide as the feed-forward it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from megascale.config.resolve import resolve
from megascale.config.schema import AltUp, Config, Experts, Model, Streams

STEP, HEAD = 512, 128
DEPTHS = (4, 5, 6)
"""layers a step of width"""
LARGEST = 40
"""steps of width of the largest shape: 20,480"""
_TIED = 3072
VOCABULARY = 128_256


@lru_cache(maxsize=2**14)
def shape(
    step: int,
    depth: int = 4,
    *,
    streams: int = 1,
    experts: int = 1,
    per_token: int = 1,
    blocks: int = 1,
    vocabulary: int = VOCABULARY,
) -> Model:
    """The decoder of width 512 `step` with `depth` x `step` layers, resolved."""
    width = STEP * step
    model = Model(
        vocab_size=vocabulary,
        width=width,
        layers=depth * step,
        heads=width // HEAD,
        kv_heads=step,
        ffn_width=width * 7 // 2,
        tie_embeddings=width <= _TIED,
        streams=Streams(count=streams),
        experts=Experts(count=experts, per_token=per_token, every=2, offset=1) if experts > 1 else Experts(),
        altup=AltUp(blocks=blocks),
    )
    return resolve(Config(model=model)).model


def shapes() -> Iterator[tuple[int, int]]:
    """Steps of width and layers a step of all dense shapes, smallest first."""
    for step in range(1, LARGEST + 1):
        for depth in DEPTHS:
            yield step, depth
