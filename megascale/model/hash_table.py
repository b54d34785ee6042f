"""Fixed maps from ids to experts for the HASH router (arXiv 2202.01169; Hash Layers, arXiv 2106.04426). V ids, E experts, k per token."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from megascale.model.exchange import identity
from megascale.model.origin import Draw, origin_of


def hash_table(
    kind: str, vocabulary: int, per_token: int, experts: int, seed: int, layer: int, counts: Tensor | None = None
) -> Tensor:
    """The experts of every id, int64 [V, k], distinct in a row; a pure function of the arguments.

    modulo: (id + i) mod E for the i-th choice, the same in all layers. random: drawn for each id and layer (as the public code of Hash
    Layers does, once for each id). balanced: ids, the frequent first, go to the experts with the fewest tokens so far by `counts` [V]
    (none: all ids are equally frequent), in an order that differs between layers.
    """
    ids = torch.arange(vocabulary)
    if kind == "modulo":
        return (ids[:, None] + torch.arange(per_token)) % experts
    if kind == "balanced":
        counts = torch.ones(vocabulary) if counts is None else counts
        first = _numbers(torch.arange(experts), 1, seed, layer)[:, 0].argsort(stable=True)
        return _balanced(counts, per_token, first.tolist(), _numbers(ids, 1, seed, layer)[:, 0])
    assert kind == "random"
    return _distinct(_numbers(ids, per_token, seed, layer), experts)


def _numbers(ids: Tensor, number: int, seed: int, layer: int) -> Tensor:
    """Uniform numbers [V, number] keyed by seed, layer and id."""
    return origin_of(ids[:, None], Draw(seed), identity).at(layer).draws(1, number)[:, 0]


def _distinct(numbers: Tensor, experts: int) -> Tensor:
    """k different experts of each row of uniform numbers [V, k]: the i-th is one of the E - i that are left."""
    chosen = torch.empty(numbers.shape[0], 0, dtype=torch.int64)
    for i, number in enumerate(numbers.unbind(1)):
        expert = (number * (experts - i)).long()
        for taken in chosen.sort(-1).values.unbind(1):
            expert += expert >= taken
        chosen = torch.cat([chosen, expert[:, None]], 1)
    return chosen


def _balanced(counts: Tensor, per_token: int, experts: list[int], numbers: Tensor) -> Tensor:
    """Greedy: each id to the k experts with the fewest tokens so far, the first in the list of those with equally many. The order of the
    ids is by frequency times a random factor between 1/2 and 1, without which the most frequent ones would share experts in every layer in
    the same way.
    """
    weights = counts.double() + 1  # an id that was not seen still has to be spread
    order = (weights * 2**-numbers).argsort(descending=True, stable=True).tolist()
    heap = [(0.0, place, expert) for place, expert in enumerate(experts)]
    rows, weight_of = [[0] * per_token for _ in order], weights.tolist()
    for token in order:
        least = [heapq.heappop(heap) for _ in range(per_token)]
        rows[token] = [expert for _, _, expert in least]
        for load, place, expert in least:
            heapq.heappush(heap, (load + weight_of[token], place, expert))
    return torch.tensor(rows)
