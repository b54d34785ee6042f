"""Exchanges between the ranks of a group that autograd and torch.compile understand, and the exchange points made of them.

T tokens, E experts, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from megascale.model.routing import take_rows

# torch 2.13 renamed these two
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
_reduce_scatter = getattr(functional, "reduce_scatter_single_autograd", None) or functional.reduce_scatter_tensor_autograd


def gather(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Each rank's rows -> the rows of all ranks, in rank order. Backward: the sum of the ranks' gradients, each rank its rows."""

    def gather_tokens(x: Tensor) -> Tensor:
        return _all_gather(x.contiguous(), 0, group)

    return gather_tokens


def scatter(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Partial sums of all rows -> the full sum of this rank's rows. Backward: `gather`."""

    def scatter_tokens(x: Tensor) -> Tensor:
        return _reduce_scatter(x.contiguous(), "sum", 0, group)

    return scatter_tokens


def total(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """The sum over the ranks of something without a gradient."""

    def population_sum(counts: Tensor) -> Tensor:
        return functional.all_reduce(counts, "sum", group)

    return population_sum


def join_vocabulary(group: dist.ProcessGroup) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exp and label logit [T] over each rank's rows of the vocabulary -> over all rows (see `model.exchange.whole_vocabulary`)."""

    def join(normaliser: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        largest = normaliser.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        sums = torch.stack([(normaliser - largest).exp(), chosen])
        dist.all_reduce(sums, group=group)
        return largest + sums[0].log(), sums[1]

    return join


@dataclass(frozen=True)
class Way:
    """How the rows of one dispatch travelled, for the way back."""

    sent: list[int]
    """rows to each rank of the group"""
    received: list[int]
    """rows from each rank of the group"""
    order: Tensor
    """of the received rows, sorted by expert"""
    place: Tensor
    """the inverse of `order`"""


class ExpertExchange:
    """Rows to the ranks that hold their experts, and back (arXiv 2006.16668, section 3.2), without dropping or padding.

    The experts are spread over the group's ranks in order. One host synchronisation: the numbers of rows that each rank gets.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, group.size()

    @torch.compiler.disable
    def dispatch(self, copies: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Way]:
        """Rows [N, d] sorted by expert, counts [E] -> all ranks' rows [N', d] for the experts here, sorted by expert, counts [E/R]."""
        received_counts = torch.empty_like(counts)
        dist.all_to_all_single(received_counts, counts, group=self.group)
        by_rank = torch.stack([counts, received_counts]).view(2, self.size, -1)
        sent, received = by_rank.sum(-1).tolist()
        rows = functional.all_to_all_single_autograd(copies, received, sent, self.group)
        from_ranks = by_rank[1]
        # rows came sorted by rank, then expert
        expert = torch.arange(from_ranks.shape[1], device=counts.device).repeat(self.size)
        order = torch.repeat_interleave(expert, from_ranks.flatten(), output_size=sum(received)).argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return take_rows(rows, order, place[:, None]), from_ranks.sum(0), Way(sent, received, order, place)

    @torch.compiler.disable
    def combine(self, outputs: Tensor, way: Way) -> Tensor:
        """The experts' outputs [N', d] -> [N, d] in the order of `dispatch`'s rows."""
        back = take_rows(outputs, way.place, way.order[:, None])
        return functional.all_to_all_single_autograd(back, way.sent, way.received, self.group)
