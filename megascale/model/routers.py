"""The routers: which k of E experts each token is sent to, and with what weight. One class each behind one interface.

T tokens, P streams, N = T*P rows (streams of a token beside each other), d width, E experts, k per token, V vocabulary. The routing
population of a stream is the global micro-batch, whose tokens may be spread over ranks: what is counted over it goes through
`population_sum`. Router arithmetic is fp32 whatever the model's precision. In evaluation routers exchange and report nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Experts, Model
from megascale.model.exchange import Exchange, identity
from megascale.model.hash_table import hash_table
from megascale.model.origin import Origin
from megascale.model.sinkhorn import column_error, column_sums, sinkhorn

Routed = tuple[Tensor, Tensor, dict[str, Tensor]]
"""gates [N, k] (fp32), experts [N, k] (int64, distinct in a row), and the report: what losses and metrics need"""


def streams_of(rows: Tensor, origin: Origin) -> int:
    """P, how many streams the rows [N, ...] of the tokens of `origin` are of."""
    return rows.shape[0] // origin.ids.shape[0]


def by_stream(rows: Tensor, origin: Origin) -> Tensor:
    """[N, ...] -> [T, P, ...]."""
    return rows.unflatten(0, (-1, streams_of(rows, origin)))


class Router(nn.Module, ABC):
    """What all routers share. P counts the streams that are here: all of the model's, or one at a time. Their report, in training:

    balance, router_z, entropy  losses (see `loss_weights`): this rank's part, the sum over ranks is the loss
    load [P, E]                 choices of the tokens here
    residual [2]                s_base: largest relative column error of each stream's plan, summed, and their number
    policy [T, P, 3]            rl_r: log-probability of the choice, baseline, squared norm of its gradient by the logits (see `policy`)
    """

    def __init__(self, model: Model):
        super().__init__()
        self.experts, self.per_token, self.streams = model.experts.count, model.experts.per_token, model.streams.count
        self.population_sum: Exchange = identity

    def start(self, seed: int, layer: int, id_counts: Tensor | None = None) -> None:
        """Set the buffers to the start of a run; a pure function of seed, layer and how often each id [V] occurs in the corpora (none:
        not known, all ids count alike).
        """

    @abstractmethod
    def forward(self, x: Tensor, origin: Origin) -> Routed:
        """Route rows x [N, d] of the tokens that `origin` tells about."""

    def counts(self, experts: Tensor, origin: Origin) -> Tensor:
        """How many of the rows here chose each expert: [P, E], fp32, of experts [N, k]."""
        # one choice after the other: [N, k, E] is never there
        chosen = sum(_is_expert(choice, self.experts).float() for choice in experts.split(1, 1))
        assert isinstance(chosen, Tensor)
        return by_stream(chosen, origin).sum(0)

    def even_gates(self, experts: Tensor) -> Tensor:
        """Gates that do not depend on the router: 1/k."""
        return torch.full(experts.shape, 1 / self.per_token, device=experts.device)


class LinearRouter(Router):
    """A router with logits W x, W [E, d] in fp32, and their losses."""

    def __init__(self, model: Model):
        super().__init__(model)
        self.weight = nn.Parameter(torch.empty(self.experts, model.width))

    def logits(self, x: Tensor) -> Tensor:
        """[N, E] of x [N, d]."""
        return F.linear(x.to(self.weight.dtype), self.weight)

    def renormalised(self, gates: Tensor) -> Tensor:
        """Gates that sum to 1 for k > 1. One expert's gate would be 1 and teach the router nothing: it stays as it is."""
        return gates / gates.sum(-1, keepdim=True) if self.per_token > 1 else gates

    def balance(self, scores: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
        """E sum_e f_e p_e, f the share of the choices and p the mean score over the population, averaged over streams (Switch,
        arXiv 2101.03961, Eq. 4-6); and the population's number of tokens. scores [N, E] sum to 1 in a row; load [P, E].
        """
        tokens = load.new_full((1, self.experts), scores.shape[0] / load.shape[0])
        summed = self.population_sum(torch.cat([load, tokens]).detach())
        population = summed[-1, 0]
        share = summed[:-1] / (population * self.per_token)
        mean_score = scores.unflatten(0, (-1, load.shape[0])).sum(0) / population
        return self.experts * (share * mean_score).sum() / self.streams, population

    def router_z(self, logits: Tensor, population: Tensor) -> Tensor:
        """Mean logsumexp^2 (arXiv 2202.08906, Eq. 5)."""
        return logits.logsumexp(-1).square().sum() / (population * self.streams)


class SoftmaxRouter(LinearRouter):
    """Top-k of the softmax over experts (arXiv 2101.03961; renormalised for k > 1 as in Mixtral, arXiv 2401.04088)."""

    def forward(self, x: Tensor, origin: Origin) -> Routed:
        logits = self.logits(x)
        probabilities = logits.softmax(-1)
        gates, experts = probabilities.topk(self.per_token, -1)
        gates = self.renormalised(gates)
        if not self.training:
            return gates, experts, {}
        load = self.counts(experts, origin)
        balance, population = self.balance(probabilities, load)
        return gates, experts, {"balance": balance, "router_z": self.router_z(logits, population), "load": load}


class SigmoidRouter(LinearRouter):
    """Top-k of the sigmoids plus a bias that balances the loads (DeepSeek-V3, arXiv 2412.19437, Eq. 12-16; arXiv 2408.15664).

    The gate is the sigmoid without the bias. The bias is state, not a parameter: it moves once a step (`move_bias`).
    """

    bias: Tensor

    def __init__(self, model: Model):
        super().__init__(model)
        self.register_buffer("bias", torch.zeros(self.experts))
        self.rate, self.has_balance_loss = model.experts.bias_rate, bool(model.experts.balance_loss)

    def start(self, seed: int, layer: int, id_counts: Tensor | None = None) -> None:
        self.bias.zero_()

    def forward(self, x: Tensor, origin: Origin) -> Routed:
        scores = self.logits(x).sigmoid()
        experts = (scores.detach() + self.bias).topk(self.per_token, -1).indices
        gates = self.renormalised(scores.gather(-1, experts))
        if not self.training:
            return gates, experts, {}
        report = {"load": self.counts(experts, origin)}
        if self.has_balance_loss:
            report["balance"] = self.balance(scores / scores.sum(-1, keepdim=True), report["load"])[0]
        return gates, experts, report

    @torch.no_grad()
    def move_bias(self, load: Tensor) -> None:
        """One step of the bias towards even loads: by `bias_rate`, up for experts below the mean of the load [E], down above it.

        The load is whole numbers in fp64, so that the sign is exact and the same in every layout.
        """
        error = load.sum() - load * self.experts
        self.bias += self.rate * error.sign().to(self.bias)


class SinkhornRouter(LinearRouter):
    """S-BASE (arXiv 2202.01169, section 3.1): top-k of a transport plan between tokens and experts, without a gradient through the plan.

    The paper gives neither gate nor iterations: the gate here is the softmax probability of the chosen expert (or its sigmoid, as in
    BASE layers, arXiv 2103.16716, and Megatron-LM). Evaluation chooses by the logits alone, as there.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        settings = model.experts
        self.iterations, self.tolerance, self.gate = settings.sinkhorn_iterations, settings.sinkhorn_tolerance, settings.gate

    def forward(self, x: Tensor, origin: Origin) -> Routed:
        logits = self.logits(x)
        scores = logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()
        if not self.training:
            experts = logits.topk(self.per_token, -1).indices
            return self.renormalised(scores.gather(-1, experts)), experts, {}
        with torch.no_grad():
            rows = by_stream(logits.detach(), origin)
            potentials = sinkhorn(rows, self.population_sum, self.iterations, self.tolerance)
            # the order of a row's experts in the plan is that of logits + potentials: the row's own factor cancels
            experts = (rows + potentials).topk(self.per_token, -1).indices.flatten(0, 1)
            columns = self.population_sum(column_sums(rows, potentials))
            errors = column_error(columns)
        report = {"load": self.counts(experts, origin), "router_z": self.router_z(logits, columns[0].sum())}
        report["residual"] = torch.stack([errors.sum(), torch.ones_like(errors).sum()])
        return self.renormalised(scores.gather(-1, experts)), experts, report


class ReinforceRouter(LinearRouter):
    """RL-R (arXiv 2202.01169, section 3.2): experts drawn from the policy softmax(W x), which learns by REINFORCE; gates are 1/k.

    The baseline is a bias-free d -> d/8 -> 1 network on the router's input (the paper's parameter counts say so; SiLU is our choice) that
    passes no gradient on to it. For k > 1 experts are drawn without replacement (Plackett-Luce). Evaluation takes the likeliest.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        hidden = baseline_width(model)
        self.baseline_hidden = nn.Parameter(torch.empty(hidden, model.width))
        self.baseline_out = nn.Parameter(torch.empty(1, hidden))

    def forward(self, x: Tensor, origin: Origin) -> Routed:
        logits = self.logits(x)
        if not self.training:
            experts = logits.topk(self.per_token, -1).indices
            return self.even_gates(experts), experts, {}
        probabilities = logits.softmax(-1)
        experts = draw(logits.detach(), origin.draws(streams_of(x, origin), self.per_token).flatten(0, 1))
        load = self.counts(experts, origin)
        balance, population = self.balance(probabilities, load)
        entropy = -(probabilities * logits.log_softmax(-1)).sum() / (population * self.streams)
        report = {"balance": balance, "router_z": self.router_z(logits, population), "entropy": entropy, "load": load}
        log_pi, squared_norm = log_probability(logits, experts)
        report["policy"] = by_stream(torch.stack([log_pi, self.baseline(x), squared_norm], -1), origin)
        return self.even_gates(experts), experts, report

    def baseline(self, x: Tensor) -> Tensor:
        """The expected reward [N] of rows x [N, d], in nats."""
        hidden = F.silu(F.linear(x.detach().to(self.baseline_hidden.dtype), self.baseline_hidden))
        return F.linear(hidden, self.baseline_out)[:, 0]


class HashRouter(Router):
    """HASH (arXiv 2202.01169, section 3.3; Hash Layers, arXiv 2106.04426): a fixed table from ids to experts; gates are 1/k, no loss.

    The table [V, k] is state: it is saved with the weights, whose meaning depends on it.
    """

    table: Tensor

    def __init__(self, model: Model):
        super().__init__(model)
        assert model.vocab_size is not None
        self.kind = model.experts.hash_map
        self.register_buffer("table", torch.zeros(model.vocab_size, self.per_token, dtype=torch.int32))

    def start(self, seed: int, layer: int, id_counts: Tensor | None = None) -> None:
        self.table.copy_(hash_table(self.kind, len(self.table), self.per_token, self.experts, seed, layer, id_counts))

    def forward(self, x: Tensor, origin: Origin) -> Routed:
        experts = self.table[origin.ids].long().repeat_interleave(streams_of(x, origin), 0)
        return self.even_gates(experts), experts, ({"load": self.counts(experts, origin)} if self.training else {})


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "s_base": SinkhornRouter,
    "rl_r": ReinforceRouter,
    "hash": HashRouter,
}
"""By `model.experts.router`."""


def loss_weights(experts: Experts) -> dict[str, float]:
    """The losses of the chosen router and their weights in the total loss, in a fixed order; empty for a dense model."""
    weights = {
        "balance": experts.balance_loss or 0.0,
        "router_z": experts.z_loss,
        "entropy": -experts.entropy_bonus,
        "policy": experts.policy_loss,
        "baseline": experts.baseline_loss,
    }
    names = {
        "softmax": ("balance", "router_z"),
        "sigmoid": ("balance",) if experts.balance_loss else (),
        "s_base": ("router_z",),
        "rl_r": ("balance", "router_z", "entropy", "policy", "baseline"),
        "hash": (),
    }[experts.router]
    return {name: weights[name] for name in names} if experts.count > 1 else {}


def baseline_width(model: Model) -> int:
    """Hidden width of RL-R's baseline."""
    return max(model.width // 8, 1)


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """k experts [N, k] drawn one after the other without replacement from softmax(logits [N, E]), by uniform numbers [N, k] in [0, 1)."""
    chosen: list[Tensor] = []
    for number in numbers.unbind(-1):
        reached = logits.softmax(-1).double().cumsum(-1)
        # the first expert whose sum exceeds the number; one without probability never does
        chosen.append((reached <= number[:, None] * reached[:, -1:]).sum(-1))
        logits = logits.masked_fill(_is_expert(chosen[-1][:, None], logits.shape[-1]), -torch.inf)
    return torch.stack(chosen, -1)


def _is_expert(choice: Tensor, experts: int) -> Tensor:
    """bool [N, E] of one choice [N, 1]; with it nothing has to be scattered (see `megascale.kernels.dispatch.sort_copies`)."""
    return choice == torch.arange(experts, device=choice.device)


def log_probability(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of drawing experts [N, k] in this order without replacement, [N], and the squared norm [N] of its gradient by the logits
    [N, E] (without a gradient of its own).
    """
    remaining, total, gradient = logits, logits.new_zeros(logits.shape[0]), torch.zeros_like(logits)
    for expert in experts.split(1, -1):
        drawn = _is_expert(expert, logits.shape[-1])
        total = total + remaining.masked_fill(~drawn, 0.0).sum(-1) - remaining.logsumexp(-1)
        gradient = gradient - remaining.detach().softmax(-1) + drawn.to(gradient.dtype)
        remaining = remaining.masked_fill(drawn, -torch.inf)
    return total, gradient.square().sum(-1)
