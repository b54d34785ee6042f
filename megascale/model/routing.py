"""Routed experts: dispatch by sorting, capacity, grouped GEMM.

T tokens, P streams, N = T*P rows, d width, E experts, k per token, M copies of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.kernels.dispatch import combine_copies, copy_rows, sort_copies, sum_copies
from megascale.kernels.fused import is_fused
from megascale.kernels.grouped import grouped_linear
from megascale.kernels.swiglu import swiglu, weighted_swiglu
from megascale.model.exchange import OrderedExchange, Split, are_here, keep_rows, only_rank, take_back
from megascale.model.layers import SwiGLU
from megascale.model.origin import Origin
from megascale.model.routers import ROUTERS


def most_is_known(model: Model) -> bool:
    """Whether all ranks know without asking how many copies of a rank's tokens an expert may take at most: a capacity is given by each
    rank's tokens alone, and all have equally many (of Sequence-AltUp's kept ones they have not). A capacity over the tokens of all ranks
    may be filled by those of one.
    """
    experts = model.experts
    return experts.capacity_factor is not None and experts.scope == "rank" and model.altup.form != "sequence"


class Experts(nn.Module):
    """E SwiGLU feed-forwards, k per token, and shared ones that see every token. [T, P, d] -> [T, P, d] and the router's report.

    The N*k copies are sorted by expert and each expert multiplies its own rows (arXiv 2211.15841). Nothing is dropped, unless a capacity
    is set: then, in training, the copies beyond it are, and a token keeps what its other experts and the residual give. The report gains
    dropped [2]: dropped copies and all copies of the rows here.
    """

    def __init__(self, model: Model):
        super().__init__()
        experts = model.experts
        assert experts.width is not None
        self.router = ROUTERS[experts.router](model)
        self.capacity_factor, self.count = experts.capacity_factor, experts.count
        self.most_is_known = most_is_known(model)
        self.gate = nn.Parameter(torch.empty(experts.count, experts.width, model.width))
        self.up = nn.Parameter(torch.empty(experts.count, experts.width, model.width))
        self.down = nn.Parameter(torch.empty(experts.count, model.width, experts.width))
        self.shared = SwiGLU(model.width, experts.shared * experts.width) if experts.shared else None
        by_expert, width = Split(0, "ep", experts.count), experts.width
        self.splits = {name: (by_expert, Split(dim, "etp", width)) for name, dim in (("gate", 1), ("up", 1), ("down", 2))}
        self.dispatch: Callable[[Tensor, Tensor, int | None, bool | None], Any] = keep_rows
        self.receive: Callable[[Any], tuple[Tensor, Tensor, Any]] = are_here
        self.combine: Callable[[Tensor, Any], Tensor] = take_back
        self.population_order: OrderedExchange = only_rank
        # a pipeline may make it keep for later what the weight's gradient is made of
        self.multiply: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_linear
        self.fused: bool | None = None
        """whether its kernels are used (`megascale.kernels.fused.is_fused`)"""

    def forward(self, x: Tensor, origin: Origin) -> tuple[Tensor, dict[str, Tensor]]:
        rows = x.flatten(0, 1)
        gates, experts, report = self.router(rows, origin)
        limited, k = self.capacity_factor is not None and self.training, experts.shape[1]
        if limited:
            within = self.within_capacity(experts, x.shape[1])
            experts = torch.where(within, experts, self.count)  # no expert: sorted behind all of them
            report["dropped"] = torch.stack([(~within).sum(), torch.ones_like(within).sum()]).double()
        order, place, counts = sort_copies(experts, self.count, self.fused)
        # how many are kept only the device knows: dropped copies stay, unread, behind the last row that has an expert
        most = self.most_kept(x.shape[0], x.shape[1], k) if limited and self.most_is_known else None
        parcel = self.dispatch(copy_rows(rows, order, place, limited, self.fused), counts, most, self.fused)
        shared = None if self.shared is None else self.shared(rows)  # while the copies travel
        copies, counts, way = self.receive(parcel)
        del parcel
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = self.multiply(copies, self.gate, ends), self.multiply(copies, self.up, ends)
        if is_fused(rows, self.fused) and self.combine is take_back:  # gates do not travel
            result = sum_copies(self.multiply(weighted_swiglu(gate, up, gates, order, ends), self.down, ends), place)
        else:
            outputs = self.combine(self.multiply(swiglu(gate, up, self.fused), self.down, ends), way)
            result = combine_copies(outputs, gates, order, place, limited, self.fused)
        if shared is not None:
            result = result + shared
        return result.view(x.shape), report

    def within_capacity(self, experts: Tensor, streams: int) -> Tensor:
        """Which choices [N, k] of this many streams their experts have room for.

        An expert takes the first ceil(capacity_factor * T k / E) choices of each stream's population: all first choices before all second
        ones (GShard, arXiv 2006.16668, Algorithm 1), and among these in the order of the tokens in the global micro-batch.
        """
        assert self.capacity_factor is not None
        choices = experts.unflatten(0, (-1, streams)).permute(2, 1, 0)
        k, _, tokens = choices.shape
        kinds = torch.arange(k * streams, device=experts.device).view(k, streams, 1)
        kind = (kinds * self.count + choices).flatten()
        _, place, counts = sort_copies(kind[:, None], k * streams * self.count, False)
        here = place[:, 0] - (counts.cumsum(0) - counts)[kind]
        before, total = self.population_order(counts.view(k, streams, self.count))
        position = here + (before + total.cumsum(0) - total).flatten()[kind]
        capacity = (total.sum((0, 2)).double() * self.capacity_factor / self.count).ceil()
        within = position.view(k, streams, tokens) < capacity[:, None]
        return within.permute(2, 1, 0).reshape(-1, k)

    def most_kept(self, tokens: int, streams: int, per_token: int) -> int:
        """The most copies of the tokens here that one expert may take."""
        assert self.capacity_factor is not None
        return streams * min(math.ceil(tokens * per_token * self.capacity_factor / self.count), tokens)
