"""Memory of a rank by arithmetic: what the dry run finds by running every operation on meta tensors, in microseconds.

Activations are those that eager execution keeps (torch.compile keeps less), counted tensor by tensor in `kept_by_layer`; the comments there
name them. Two moments can be the worst of a step: the loss of a chunk of tokens on the last stage, and the backward pass of a layer. The
form of the counts is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), with this model's own tensors.

T tokens, t tensor-parallel ranks, d width, H D width of the queries, G D of the keys, f feed-forward width, P streams, K blocks, k experts
a token, e bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

from megascale.config.layout import V_SHAPED, stages_per_rank
from megascale.config.size import end_width
from megascale.model.loss import CHUNK
from megascale.parallel.rebuild import rebuilding_saves
from megascale.parallel.zero_traffic import MOST_LIVE
from megascale.plan.cut import LayerKind
from megascale.plan.rank import Elements, Plan


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment of a step."""

    parameters: float
    gathered: float
    """weights that ZeRO 3 holds whole for a while"""
    gradients: float
    """fp32, whole until the last micro-batch"""
    optimizer: float
    """fp32 masters and moments"""
    activations: float
    """of all micro-batches under way, with buffers of the pipeline and what the backward pass needs besides"""
    imbalance: float = 0.0
    """what the fullest rank's experts hold beyond an even share"""
    fragmentation: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.activations + self.imbalance + self.fragmentation

    @property
    def state(self) -> float:
        """What does not depend on the micro-batch."""
        return self.parameters + self.gathered + self.gradients + self.optimizer


def rank_memory(plan: Plan, rank: int, imbalance: float = 1.0, fragmentation: float = 0.0) -> Memory:
    """Memory of a pipeline rank.

    Args:
        imbalance: rows of the fullest rank's experts over an even share.
        fragmentation: what the allocator cannot use, as a share of activations.
    """
    parameters, gathered, gradients, optimizer = _state(plan, plan.rank_elements(rank))
    activations = _activations(plan, rank)
    more = _activations(plan, rank, imbalance) - activations if imbalance > 1 else 0.0
    return Memory(parameters, gathered, gradients, optimizer, activations, more, fragmentation * (activations + more))


def worst_rank(plan: Plan, imbalance: float = 1.0, fragmentation: float = 0.0) -> tuple[int, Memory]:
    """The pipeline rank that needs most: under 1F1B the first ones keep most micro-batches, and the last has the head."""
    found = ((rank, rank_memory(plan, rank, imbalance, fragmentation)) for rank in plan.cut.distinct_ranks)
    return max(found, key=lambda pair: pair[1].total)


# What does not move -------------------------------------------------------------------------------------------------------


def _state(plan: Plan, elements: Elements) -> tuple[float, float, float, float]:
    """Weights, those that ZeRO 3 gathers, gradients, optimizer; as `megascale.train.dry_run` counts them."""
    e, zero, muon = plan.element_bytes, plan.zero, plan.config.optimizer.name == "muon"
    parameters = gradients = optimizer = whole = 0.0
    rows = (
        (elements.matrices, e, muon, plan.data_shards),
        (elements.others, e, False, plan.data_shards),
        (elements.wide, 4, False, plan.data_shards),
        (elements.experts, e, muon, plan.expert_shards),
    )
    for count, size, by_muon, ranks in rows:
        shards = ranks if zero else 1
        whole += count * size
        parameters += count * size / (plan.data_shards if zero == 3 else 1)
        gradients += 4 * count
        copied = size < 4 or (zero > 0 and not by_muon)
        optimizer += 4 * count * (copied + (1 if by_muon else 2)) / shards
    gathered = whole * min(elements.total, MOST_LIVE) / elements.total if zero == 3 else 0.0
    return parameters, gathered, gradients, optimizer


# What a layer keeps -------------------------------------------------------------------------------------------------------


def kept_by_layer(plan: Plan, kind: LayerKind, streams: int, imbalance: float = 1.0) -> float:
    """Bytes that a layer which is not recomputed keeps of a micro-batch.

    Args:
        kind: in the model's first layer streams do not differ yet: norm, projections and rotary embedding are of one.
        streams: that run together.
        imbalance: rows of this rank's experts over an even share.
    """
    first, routed, strided = kind
    model, e, d = plan.model, plan.element_bytes, plan.model.width
    assert model.head_dim
    tokens = plan.tokens / (model.altup.stride if strided else 1)
    before, share = 1 if first else streams, tokens / plan.tp
    own_input = 0 if model.altup.blocks > 1 and e == 4 else 4  # fp32 blocks are views of the state, which is counted below
    norm = share * before * (d * (own_input + 4) + 4) + share * streams * (8 * d + 4)  # fp32 input, normalised; one over the rms
    heads = tokens * before * (plan.query_width + 2 * plan.key_width) * e  # rotated q and k, and v
    head_norms = tokens * before * 8 * (plan.query_width + plan.key_width) * model.qk_norm
    attended = tokens * streams * (plan.query_width * e + 4 * plan.query_width / model.head_dim)  # output, log-sum-exp
    attention = tokens * before * d * e + heads + head_norms + attended + _context(plan, tokens, before, streams)
    if routed:
        feed_forward = _experts(plan, share * streams, imbalance) + _shared(plan, tokens * streams)
    else:
        feed_forward = tokens * streams * e * (d + 4 * plan.ffn_width)  # input, gate, silu, up, their product
    return norm + attention + feed_forward + _residual(plan, streams, strided)


def _context(plan: Plan, tokens: float, before: int, streams: int) -> float:
    """Context parallelism: keys and values of all tokens, or the output before its way back."""
    if plan.cp == 1:
        return 0.0
    if plan.config.parallel.context == "all_gather":
        return tokens * plan.cp * before * 2 * plan.key_width * plan.element_bytes
    return tokens * streams * plan.query_width * plan.element_bytes


def _experts(plan: Plan, rows: float, imbalance: float) -> float:
    """Of this many rows: what the router saw, the copies, their hidden states, and their outputs."""
    model, e, experts = plan.model, plan.element_bytes, plan.model.experts
    assert experts.width
    d, k = model.width, experts.per_token
    router = rows * (0 if experts.router == "hash" else 4 * d + 8 * experts.count)
    received = rows * k * imbalance * e * (d * plan.etp + 4 * experts.width)  # etp gathers rows, and cuts the width
    learned = experts.router != "hash"  # fixed gates need no outputs for their gradient
    return router + received + rows * k * (d * e * learned + 24)


def _shared(plan: Plan, tokens: float) -> float:
    experts = plan.model.experts
    assert experts.width
    width = experts.shared * experts.width / plan.tp
    return tokens * plan.element_bytes * (plan.model.width + 4 * width) * (experts.shared > 0)


def _residual(plan: Plan, streams: int, strided: bool) -> float:
    """AltUp: the state of all blocks and the update; with token-dependent coefficients two fp32 copies of a block."""
    altup, state = plan.model.altup, plan.tokens / plan.tp * streams * plan.model.width
    if strided:
        return 3 * state * plan.element_bytes
    if altup.blocks == 1:
        return 0.0
    return state * (plan.element_bytes * (altup.blocks + 1) + 8 * (altup.coefficients == "token"))


# What a rank keeps --------------------------------------------------------------------------------------------------------


def _activations(plan: Plan, rank: int, imbalance: float = 1.0) -> float:
    """The worst of the moments of a step."""
    stages = plan.stages_of(rank)
    kept = {stage: _kept_by_stage(plan, stage, imbalance) for stage in stages}
    under_way = sum(kept[stage] for stage in _under_way(plan, rank, stages))
    under_way += _between_stages(plan, rank, stages) + _waiting_weight_gradients(plan, rank, stages)
    worst = max(_in_a_layer(plan, stage, imbalance) for stage in stages)
    if plan.stage_count - 1 in stages:
        worst = max(worst, _loss(plan))
    return under_way + worst


def _between_stages(plan: Plan, rank: int, stages: list[int]) -> float:
    """What a pipeline holds besides: receive buffers for each micro-batch and neighbour, and the outputs of those under way."""
    if plan.pp == 1:
        return 0.0
    last = plan.stage_count - 1
    received = plan.micro_batches * sum((stage > 0) + (stage < last) for stage in stages)
    return (received + sum(stage < last for stage in _under_way(plan, rank, stages))) * _state_bytes(plan)


def _state_bytes(plan: Plan, streams: int | None = None) -> float:
    """The state between layers on one rank."""
    count = plan.streams if streams is None else streams
    return plan.tokens / plan.tp * count * plan.model.altup.blocks * plan.model.width * plan.element_bytes


def _one_by_one(plan: Plan) -> bool:
    return plan.config.parallel.recompute == "stream" and plan.streams > 1


def _rebuilds(plan: Plan, layers: int) -> bool:
    return plan.zero < 3 and rebuilding_saves(layers, plan.model.altup.blocks)


def _kept_by_stage(plan: Plan, stage: int, imbalance: float) -> float:
    """Bytes kept of one micro-batch between its forward and its backward pass."""
    layers, recompute = plan.cut.stages[stage], plan.config.parallel.recompute
    if _one_by_one(plan):
        return _state_bytes(plan) + _state_bytes(plan, 1 if stage == 0 else None) * (stage == 0)
    if recompute != "layer":
        return _all_layers(plan, stage, plan.streams, imbalance)
    inputs = _state_bytes(plan, 1) + (len(layers) - 1) * _state_bytes(plan) if stage == 0 else len(layers) * _state_bytes(plan)
    if not _rebuilds(plan, len(layers)):
        return inputs
    return _state_bytes(plan) * (1 + len(layers) / plan.model.altup.blocks)


def _all_layers(plan: Plan, stage: int, streams: int, imbalance: float) -> float:
    """Kept by the layers of a stage."""
    return sum(count * kept_by_layer(plan, kind, streams, imbalance) for kind, count in plan.cut.counts[stage].items())


def _under_way(plan: Plan, rank: int, stages: list[int]) -> list[int]:
    """The stages of all forward passes that a rank has done before their backward passes, at the worst time.

    1F1B: as many micro-batches as stages follow, and one. Interleaved: (v-1) p + 2 (p-1-rank) + 1 passes, p by p through its stages
    (arXiv 2104.04473, section 2.2); with weight gradients apart (p-1-rank) of them fewer. A V has 2p
    (arXiv 2401.10241, section 6), dualpipev one more.
    """
    m, p, schedule = plan.micro_batches, plan.pp, plan.config.parallel.schedule
    if p == 1:
        return stages
    if schedule == "1f1b":
        return stages * min(m, p - rank)
    if schedule in V_SHAPED:
        first = 2 * p - 1 - rank + (schedule == "dualpipev")
        return [stages[0]] * min(m, first) + [stages[1]] * min(m, rank + 1)
    v = stages_per_rank(plan.config.parallel)
    each = m // max(1, m // p)
    passes = min((v - 1) * each + (2 if schedule == "interleaved" else 1) * (p - 1 - rank) + 1, m * v)
    order = (stages[number // each % v] for number in range(m * v))
    return list(islice(order, passes))


def _waiting_weight_gradients(plan: Plan, rank: int, stages: list[int]) -> float:
    """zero_bubble: inputs and output gradients of the linear layers whose weight gradients wait, those of `rank` passes."""
    schedule = plan.config.parallel.schedule
    if plan.pp == 1 or schedule != "zero_bubble":
        return 0.0
    e, d, model = plan.element_bytes, plan.model.width, plan.model
    waiting = min(rank, plan.micro_batches) * sum(len(plan.cut.stages[stage]) for stage in stages) / len(stages)
    rows = model.experts.per_token / plan.tp * (model.experts.width or 0) if model.experts.count > 1 else plan.ffn_width
    return waiting * plan.tokens * plan.streams * e * (4 * d + 2 * (plan.query_width + plan.key_width) + 3 * rows)


def _in_a_layer(plan: Plan, stage: int, imbalance: float) -> float:
    """What one layer needs beside what is kept: in its forward pass, or in its backward pass and the forward pass again before it."""
    model, e, d, layers, recompute = (
        plan.model,
        plan.element_bytes,
        plan.model.width,
        plan.cut.stages[stage],
        plan.config.parallel.recompute,
    )
    streams = 1 if _one_by_one(plan) else plan.streams
    dense = any(not routed for _, routed, _ in plan.cut.counts[stage])
    experts = plan.tokens / plan.tp * streams * model.experts.per_token * (model.experts.width or 0)
    state, hidden = plan.tokens * streams * d * e, e * (plan.tokens * streams * plan.ffn_width if dense else experts)
    gathered, share = state * (plan.tp > 1), state / plan.tp
    # the gradient of an activation's product, with that of the layer or with those of its factors; or of a matrix, under ZeRO and where
    # streams are summed in fp32 too
    matrix = d * plan.ffn_width if dense else plan.kinds[True].experts / 3
    backward = share * (1 + model.altup.blocks * (model.altup.blocks > 1))
    backward += max(hidden + gathered, 2 * hidden, matrix * (e + 4 * (e < 4 and bool(plan.zero or _one_by_one(plan)))))
    if _one_by_one(plan):  # all layers of a stream again, and the sums of the streams' weight gradients
        counts = plan.cut.counts[stage]
        sums = sum(count * plan.kinds[routed].total for (_, routed, _), count in counts.items())
        return backward + _all_layers(plan, stage, 1, imbalance) + 4.0 * sums
    if recompute != "layer":
        return max(backward, gathered + 5 * share)  # outputs of attention and feed-forward, before and behind their sums
    backward += max(kept_by_layer(plan, kind, streams, imbalance) for kind in plan.cut.counts[stage])
    if _rebuilds(plan, len(layers)):
        backward += _state_bytes(plan) * math.ceil(math.log2(max(len(layers), 2)))
    return backward


def _loss(plan: Plan) -> float:
    """Final norm, aggregator, and the logits of one chunk of tokens with their gradients."""
    model, e, ends = plan.model, plan.element_bytes, end_width(plan.model)
    share = plan.tokens / plan.tp * plan.streams
    normed = share * ends * (8 + e) + _state_bytes(plan)
    tokens = plan.tokens / plan.stream
    aggregated = plan.tokens * model.width * e * 3 / plan.tp if model.streams.count > 1 else 0.0
    inputs = tokens * ends * e * ((plan.tp > 1) + 1)  # gathered, and their gradient
    rows = min(CHUNK, tokens)
    logits = rows * plan.vocabulary * (13 + e * (2 if tokens > CHUNK else 1))
    return normed + aggregated + inputs + logits + 4.0 * plan.vocabulary * ends
