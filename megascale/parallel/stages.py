"""Where a pipeline's stages begin and end: the cut whose most expensive stage is the cheapest.

L layers, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from megascale.config.layout import stage_count
from megascale.config.schema import Config
from megascale.model.accounting import end_flops_per_token, flops_by_layer, mean_visible_keys


def stage_layers(config: Config) -> list[range]:
    """The layers of each pipeline stage of a resolved config that knows the vocabulary's size: contiguous, in order, at least one each.

    A stage costs the FLOPs that it computes for a token: its layers' as P, K, the experts and the tokens that they keep make them, once
    more a forward pass where they are recomputed, and the last stage's aggregator and head, which P does not multiply. So a phase with
    other streams may have another cut. Documents are taken to fill their sequences: a corpus must not move a layer.
    """
    model, recompute = config.model, config.parallel.recompute
    keys = mean_visible_keys((config.data.sequence_length - 1) / 2, model)
    again = recompute == "layer" or (recompute == "stream" and model.streams.count > 1)
    layers = tuple(round(flops * (4 if again else 3)) for flops in flops_by_layer(model, keys))
    return cheapest_cut(layers, stage_count(config.parallel), round(3 * end_flops_per_token(model)))


@lru_cache
def cheapest_cut(costs: Sequence[int], stages: int, end: int) -> list[range]:
    """The contiguous cut of the layers into stages, none empty, whose most expensive stage is the cheapest; exact, O(S L^2).

    Of those the most even one (least sum of squares), and of those the one with the fewest layers in the first stages, which keep the
    activations of the most micro-batches under 1F1B.

    Args:
        costs: of each layer; hashable, any unit.
        stages: S, at most L.
        end: what the last stage costs beside its layers.
    """
    assert 1 <= stages <= len(costs), f"{len(costs)} layers cannot fill {stages} stages"
    sums = [0, *accumulate(costs)]
    layers = len(costs)
    # of the layers from each number on, in the last 1, 2, ... stages: the cheapest worst stage
    worst: list[int | None] = [None, *(sums[layers] - sums[first] + end for first in range(1, layers)), None]
    worst[0] = sums[layers] + end
    for _ in range(stages - 1):
        worst = [
            min(
                (max(sums[stop] - sums[first], rest) for stop in range(first + 1, layers) if (rest := worst[stop]) is not None),
                default=None,
            )
            for first in range(layers + 1)
        ]
    assert worst[0] is not None
    return _most_even(sums, stages, end, worst[0])


def _most_even(sums: Sequence[int], stages: int, end: int, most: int) -> list[range]:
    """The cut with the least sum of squares of the stages' costs, none of which is above `most`; `sums[i]` is the cost of i layers."""
    layers = len(sums) - 1
    last = [sums[layers] - sums[first] + end for first in range(layers)]
    least: list[int | None] = [cost**2 if cost <= most else None for cost in last] + [None]
    ways: list[list[int]] = []  # where the stage ends that begins at a layer, by stage, from the last but one backwards
    for _ in range(stages - 1):
        found: list[int | None] = []
        way: list[int] = []
        for first in range(layers + 1):
            stops = range(first + 1, layers)
            options = [
                ((cost**2 + rest), stop)
                for stop in stops
                if (cost := sums[stop] - sums[first]) <= most and (rest := least[stop]) is not None
            ]
            square, stop = min(options, default=(None, layers))
            found.append(square)
            way.append(stop)
        least, ways = found, [*ways, way]
    borders = [0]
    for way in reversed(ways):
        borders.append(way[borders[-1]])
    return [range(start, stop) for start, stop in zip(borders, [*borders[1:], layers], strict=True)]
