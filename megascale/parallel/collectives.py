"""Exchanges between the ranks of a group that autograd and torch.compile understand, and the exchange points made of them.

Each is an opaque op that has ended when it returns. torch's functional collectives gave wrong gradients in compiled layers with tensor
parallelism (torch 2.13, gloo; forward and eager were right): tests/parallel has the case.

T tokens, N rows, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megascale.model.exchange import Exchange, OrderedExchange, unit_range

# torch 2.13 has new names for two collectives and warns of the old ones
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


@torch.library.custom_op("megascale::gather_rows", mutates_args=())
def gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """Each rank's rows -> the rows of all R ranks, in rank order. Backward: `scatter_sum`."""
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), _group(group))
    return out


@torch.library.custom_op("megascale::scatter_sum", mutates_args=())
def scatter_sum(x: Tensor, ranks: int, group: str) -> Tensor:
    """Partial sums of all rows -> the whole sum of this rank's rows, 1/R of them. Backward: `gather_rows`."""
    process_group, x = _group(group), x.contiguous()
    if dist.get_backend(process_group) == "gloo":  # its reduce-scatter is an all-reduce (torch 2.13), which sends twice as much
        parts = torch.empty_like(x)
        dist.all_to_all_single(parts, x, group=process_group)
        return parts.unflatten(0, (ranks, x.shape[0] // ranks)).sum(0)
    out = x.new_empty(x.shape[0] // ranks, *x.shape[1:])
    _reduce_scatter(out, x, group=process_group)
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


@torch.library.custom_op("megascale::gather_uneven", mutates_args=())
def gather_uneven(x: Tensor, rows: list[int], rank: int, group: str) -> Tensor:
    """Each rank's rows [rows[rank], d] -> the rows of all ranks [sum(rows), d], in rank order. Backward: `scatter_uneven`.

    As one all-to-all in which a rank sends everyone the same: no padding, and neither gloo nor NCCL gathers uneven parts at once.
    """
    if len(set(rows)) == 1:
        return gather_rows(x, len(rows), group)
    out = x.new_empty(sum(rows), *x.shape[1:])
    dist.all_to_all_single(out, x.repeat(len(rows), 1), rows, [rows[rank]] * len(rows), group=_group(group))
    return out


@torch.library.custom_op("megascale::scatter_uneven", mutates_args=())
def scatter_uneven(x: Tensor, rows: list[int], rank: int, group: str) -> Tensor:
    """Partial sums of all rows [sum(rows), d] -> the whole sum of this rank's rows [rows[rank], d]. Backward: `gather_uneven`."""
    if len(set(rows)) == 1:
        return scatter_sum(x, len(rows), group)
    parts = x.new_empty(len(rows), rows[rank], *x.shape[1:])
    dist.all_to_all_single(parts.flatten(0, 1), x.contiguous(), [rows[rank]] * len(rows), rows, group=_group(group))
    return parts.sum(0)


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


@gather_uneven.register_fake
def _(x: Tensor, rows: list[int], rank: int, group: str) -> Tensor:
    return x.new_empty(sum(rows), *x.shape[1:])


@scatter_uneven.register_fake
def _(x: Tensor, rows: list[int], rank: int, group: str) -> Tensor:
    return x.new_empty(rows[rank], *x.shape[1:])


def _keep_arguments(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.arguments = inputs[1:]


gather_rows.register_autograd(lambda ctx, grad: (scatter_sum(grad, *ctx.arguments), None, None), setup_context=_keep_arguments)
scatter_sum.register_autograd(lambda ctx, grad: (gather_rows(grad, *ctx.arguments), None, None), setup_context=_keep_arguments)

sum_parts.register_autograd(lambda ctx, grad: (sum_parts(grad, *ctx.arguments), None), setup_context=_keep_arguments)
swap_rows.register_autograd(lambda ctx, grad: (swap_rows(grad, *ctx.arguments), None), setup_context=_keep_arguments)
gather_uneven.register_autograd(
    lambda ctx, grad: (scatter_uneven(grad, *ctx.arguments), None, None, None), setup_context=_keep_arguments
)
scatter_uneven.register_autograd(
    lambda ctx, grad: (gather_uneven(grad, *ctx.arguments), None, None, None), setup_context=_keep_arguments
)


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
