"""Routed experts: softmax top-k router, dropless dispatch by sorting, grouped GEMM.

T tokens, P streams, N = T*P rows, d width, E experts, k per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.kernels.grouped import grouped_linear
from megascale.model.exchange import Exchange, Split, identity, keep_rows, take_back
from megascale.model.layers import SwiGLU


class Router(nn.Module):
    """Top-k of the softmax over experts (arXiv 2101.03961; renormalised for k > 1 as in Mixtral, arXiv 2401.04088). All in fp32.

    With k = 1 the gate is the probability itself: renormalised it would be 1 and the router would learn nothing.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.experts, self.per_token, self.streams = model.experts.count, model.experts.per_token, model.streams.count
        self.weight = nn.Parameter(torch.empty(self.experts, model.width))
        self.population_sum: Exchange = identity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x [N, d] -> gates [N, k] (fp32), experts [N, k] (int64), and what the losses and the metrics need.

        balance = E sum_e f_e p_e, f the share of choices and p the mean probability over the routing population: the global micro-batch of
        one stream (Switch, arXiv 2101.03961, Eq. 4-6); router_z = mean logsumexp^2 (arXiv 2202.08906, Eq. 5). Each rank returns its own
        tokens' part of both, so that the sum over ranks is the loss. load [P, E] counts the population's choices. In evaluation only the
        choice is made.
        """
        logits = F.linear(x.to(self.weight.dtype), self.weight)
        probabilities = logits.softmax(-1)
        gates, experts = probabilities.topk(self.per_token, -1)
        if self.per_token > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        if not self.training:  # no loss to balance, and ranks may evaluate different numbers of batches: no exchange
            return gates, experts, {}
        chosen = torch.zeros_like(probabilities).scatter_(-1, experts, 1.0)
        local = chosen.view(-1, self.streams, self.experts).sum(0)
        tokens = local.new_full((1, self.experts), x.shape[0] / self.streams)
        summed = self.population_sum(torch.cat([local, tokens]).detach())
        load, population = summed[:-1], summed[-1, 0]
        mean_probability = probabilities.view(-1, self.streams, self.experts).sum(0) / population
        share = load / (population * self.per_token)
        balance = self.experts * (share * mean_probability).sum() / self.streams
        router_z = logits.logsumexp(-1).square().sum() / (population * self.streams)
        return gates, experts, {"balance": balance, "router_z": router_z, "load": load}


class Experts(nn.Module):
    """E SwiGLU feed-forwards, k per token, and shared ones that see every token. [T, P, d] -> [T, P, d] and the router's report.

    Nothing is dropped: the N*k copies are sorted by expert and each expert multiplies its own rows (arXiv 2211.15841).
    """

    def __init__(self, model: Model):
        super().__init__()
        experts = model.experts
        assert experts.width is not None
        self.router = Router(model)
        self.gate = nn.Parameter(torch.empty(experts.count, experts.width, model.width))
        self.up = nn.Parameter(torch.empty(experts.count, experts.width, model.width))
        self.down = nn.Parameter(torch.empty(experts.count, model.width, experts.width))
        self.shared = SwiGLU(model.width, experts.shared * experts.width) if experts.shared else None
        self.splits = {name: Split(0, "ep", experts.count) for name in ("gate", "up", "down")}
        self.dispatch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Any]] = keep_rows
        self.combine: Callable[[Tensor, Any], Tensor] = take_back

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = x.flatten(0, 1)
        gates, experts, report = self.router(rows)
        k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        counts = F.one_hot(experts.flatten(), self.router.experts).sum(0)
        copies, counts, way = self.dispatch(take_rows(rows, order // k, place.view(-1, k)), counts)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = F.silu(grouped_linear(copies, self.gate, ends)) * grouped_linear(copies, self.up, ends)
        outputs = self.combine(grouped_linear(hidden, self.down, ends), way)
        picked = take_rows(outputs, place, order[:, None]).view(-1, k, rows.shape[1])
        result = (picked * gates[..., None].to(picked.dtype)).sum(1)
        if self.shared is not None:
            result = result + self.shared(rows)
        return result.view(x.shape), report


class _TakeRows(torch.autograd.Function):
    """x[index], whose backward sums the known places of each row instead of scattering with atomics: same bits on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return (grad[places[:, 0]] if places.shape[1] == 1 else grad[places].sum(1)), None, None


def take_rows(x: Tensor, index: Tensor, places: Tensor) -> Tensor:
    """x[index], [M, d]; places [rows of x, c] lists where in `index` each row of x stands."""
    return _TakeRows.apply(x, index, places)
