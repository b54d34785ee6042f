"""Exchanges between the ranks of a group that autograd and torch.compile understand, and the exchange points made of them.

Each is an opaque op that has ended when it returns. torch's functional collectives gave wrong gradients in compiled layers with tensor
parallelism (torch 2.13, gloo; forward and eager were right): tests/parallel has the case.

T tokens, N rows, E experts, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megascale.model.exchange import Exchange, OrderedExchange, unit_range
from megascale.model.routing import take_rows


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


@torch.library.custom_op("megascale::gather_rows", mutates_args=())
def gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """Each rank's rows -> the rows of all R ranks, in rank order. Backward: `scatter_sum`."""
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), _group(group))
    return out


@torch.library.custom_op("megascale::scatter_sum", mutates_args=())
def scatter_sum(x: Tensor, ranks: int, group: str) -> Tensor:
    """Partial sums of all rows -> the whole sum of this rank's rows, 1/R of them. Backward: `gather_rows`."""
    out = x.new_empty(x.shape[0] // ranks, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=_group(group))
    return out


@torch.library.custom_op("megascale::sum_over", mutates_args=())
def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks; without a gradient."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_group(group))
    return out


@torch.library.custom_op("megascale::sum_parts", mutates_args=())
def sum_parts(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks, each of which goes on with it in its own way. Backward: the same."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_group(group))
    return out


@torch.library.custom_op("megascale::swap_rows", mutates_args=())
def swap_rows(x: Tensor, group: str) -> Tensor:
    """x [R, ...], entry r for rank r -> what the ranks have for this one, [R, ...] in rank order. Backward: the same."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=_group(group))
    return out


@torch.library.custom_op("megascale::exchange_rows", mutates_args=())
def exchange_rows(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Rows [N, d], `sent[r]` of them to rank r, in order -> `received[r]` rows from rank r, in order. Backward: the way back."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=_group(group))
    return out


@gather_rows.register_fake
def _(x: Tensor, ranks: int, group: str) -> Tensor:
    return x.new_empty(ranks * x.shape[0], *x.shape[1:])


@scatter_sum.register_fake
def _(x: Tensor, ranks: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0] // ranks, *x.shape[1:])


@sum_over.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@sum_parts.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@swap_rows.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@exchange_rows.register_fake
def _(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return x.new_empty(sum(received), *x.shape[1:])


def _keep_arguments(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.arguments = inputs[1:]


gather_rows.register_autograd(lambda ctx, grad: (scatter_sum(grad, *ctx.arguments), None, None), setup_context=_keep_arguments)
scatter_sum.register_autograd(lambda ctx, grad: (gather_rows(grad, *ctx.arguments), None, None), setup_context=_keep_arguments)

sum_parts.register_autograd(lambda ctx, grad: (sum_parts(grad, *ctx.arguments), None), setup_context=_keep_arguments)
swap_rows.register_autograd(lambda ctx, grad: (swap_rows(grad, *ctx.arguments), None), setup_context=_keep_arguments)


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    sent, received, group = ctx.arguments
    return exchange_rows(grad, received, sent, group), None, None, None


exchange_rows.register_autograd(_exchange_back, setup_context=_keep_arguments)


def gather(group: dist.ProcessGroup) -> Exchange:
    """The exchange point gather_tokens: the tokens of all ranks of the group."""
    ranks, name = group.size(), group.group_name
    return lambda x: gather_rows(x, ranks, name)


def scatter(group: dist.ProcessGroup) -> Exchange:
    """The exchange point scatter_tokens: this rank's share of the tokens, summed over the ranks of the group."""
    ranks, name = group.size(), group.group_name
    return lambda x: scatter_sum(x, ranks, name)


def total(group: dist.ProcessGroup) -> Exchange:
    """The exchange point population_sum: counts of all ranks of the group."""
    name = group.group_name
    return lambda counts: sum_over(counts, name)


def merge(group: dist.ProcessGroup) -> Exchange:
    """The exchange point merge_streams: the sum over the streams of all ranks of the group, on each of them."""
    name = group.group_name
    return lambda x: sum_parts(x, name)


def share(group: dist.ProcessGroup) -> Exchange:
    """The exchange points share_tokens, share_streams: this rank's share of what every rank of the group has for all tokens."""
    ranks, rank = group.size(), group.rank()
    return lambda x: x.unflatten(0, (ranks, -1))[rank]


def in_rank_order(group: dist.ProcessGroup) -> OrderedExchange:
    """The exchange point population_order: counts of the ranks before this one, and of all."""
    ranks, rank, name = group.size(), group.rank(), group.group_name

    def sums(counts: Tensor) -> tuple[Tensor, Tensor]:
        everyone = gather_rows(counts[None], ranks, name)
        return everyone[:rank].sum(0), everyone.sum(0)

    return sums


def join_vocabulary(group: dist.ProcessGroup) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exp and label logit [T] over each rank's rows of the vocabulary -> over all rows (see `model.exchange.whole_vocabulary`)."""

    def join(normaliser: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        largest = normaliser.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        sums = torch.stack([(normaliser - largest).exp(), chosen])
        dist.all_reduce(sums, group=group)
        return largest + sums[0].log(), sums[1]

    return join


def join_logits(group: dist.ProcessGroup, vocabulary: int) -> Exchange:
    """The exchange point join_logits: of logits [T, v] of each rank's rows of the vocabulary those of all rows."""
    ranks, name = group.size(), group.group_name
    rows = [len(unit_range(vocabulary, part, ranks)) for part in range(ranks)]
    most = max(rows)

    def join(logits: Tensor) -> Tensor:
        padded = F.pad(logits, (0, most - logits.shape[1])).t()
        parts = gather_rows(padded, ranks, name).unflatten(0, (ranks, most))
        return torch.cat([part[:size] for part, size in zip(parts, rows, strict=True)]).t()

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
        sent, received = self._rows(by_rank, copies.shape[0])
        rows = exchange_rows(copies, sent, received, self.group.group_name)
        from_ranks = by_rank[1]
        # rows came sorted by rank, then expert
        expert = torch.arange(from_ranks.shape[1], device=counts.device).repeat(self.size)
        order = torch.repeat_interleave(expert, from_ranks.flatten(), output_size=sum(received)).argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return take_rows(rows, order, place[:, None]), from_ranks.sum(0), Way(sent, received, order, place)

    def _rows(self, by_rank: Tensor, rows: int) -> list[list[int]]:
        """Rows sent to and received from each rank, of counts [2, R, E/R]. Meta tensors, which have no values (dry runs), count as evenly
        loaded experts.
        """
        if by_rank.is_meta:
            sent = [rows * (i + 1) // self.size - rows * i // self.size for i in range(self.size)]
            return [sent, [sent[self.group.rank()]] * self.size]
        return by_rank.sum(-1).tolist()

    @torch.compiler.disable
    def combine(self, outputs: Tensor, way: Way) -> Tensor:
        """The experts' outputs [N', d] -> [N, d] in the order of `dispatch`'s rows."""
        back = take_rows(outputs, way.place, way.order[:, None])
        return exchange_rows(back, way.received, way.sent, self.group.group_name)
