"""Seconds of a training step by arithmetic, part by part, on the pipeline rank that binds.

What is exchanged is what the ledger of a dry run counts (docs/layouts.md); what of it is exposed too: gradients travel beside the last
backward pass only without a pipeline, messages of tensor, context, expert and pipeline parallelism are waited for.

T tokens of a micro-batch, P streams, K blocks, d width, H D width of the queries, G D of the keys, f feed-forward width, k experts a
token, M copies of tokens for experts, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from megascale.config.errors import InputError
from megascale.config.layout import SPLIT_BACKWARD, pipeline_bubble
from megascale.config.size import end_width
from megascale.model.loss import CHUNK
from megascale.plan.cluster import Cluster
from megascale.plan.costs import BACKWARD, collective_seconds, group, pass_seconds, product_seconds
from megascale.plan.cut import LayerKind
from megascale.plan.engine import between_stages, engine_seconds, optimizer_seconds
from megascale.plan.rank import Plan

EAGER = 3.0
"""Bytes that element-wise parts move without torch.compile, over those with it: intermediate results go through memory."""
ATTENTION_BACKWARD = 2.5
"""Of fused attention, which computes the scores again (arXiv 2307.08691, section 3.1.2)."""


class Parts(NamedTuple):
    """Seconds of a stage's forward and backward pass for one micro-batch."""

    products: float = 0.0
    attention: float = 0.0
    experts: float = 0.0
    passes: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    stream: float = 0.0
    ep: float = 0.0

    def plus(self, other: Parts, times: float = 1.0) -> Parts:
        """The sum with so many of another."""
        return Parts(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part; their sum is the step."""

    products: float
    """dense matrix products"""
    attention: float
    experts: float
    """grouped products of the fullest rank"""
    passes: float
    """element-wise parts, bound by memory bandwidth"""
    recompute: float
    """the forward pass once more, without its messages"""
    tp: float
    """messages of tensor and sequence parallelism, exposed; so are the others"""
    cp: float
    stream: float
    ep: float
    pp: float
    dp: float
    """gradients and weights of the engine"""
    optimizer: float
    bubble: float
    straggle: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def shares(self) -> dict[str, float]:
        """Part -> share of the step, largest first."""
        parts = {part.name: getattr(self, part.name) / self.total for part in fields(self)}
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    @property
    def binds(self) -> str:
        """The largest part that is not the model's own arithmetic, where it takes a tenth of the step; else compute."""
        waste = {name: share for name, share in self.shares.items() if name not in ("products", "attention", "experts")}
        name = max(waste, key=lambda part: waste[part])
        return name if waste[name] >= 0.1 else "compute"


def step_time(plan: Plan, cluster: Cluster, imbalance: float = 1.0) -> StepTime:
    """Of one step on a cluster.

    Args:
        imbalance: rows of the fullest rank's experts over an even share; that rank is waited for.

    Raises:
        InputError: the run is not in bf16: a cluster states its bf16 peak.
    """
    if plan.config.precision != "bf16":
        raise InputError("precision", f"{plan.config.precision} has another peak than the cluster's", "plan with precision: bf16")
    kinds: dict[LayerKind, Parts] = {}
    ranks = {rank: _rank_parts(plan, cluster, rank, imbalance, kinds) for rank in plan.cut.distinct_ranks}
    binding = max(ranks, key=lambda rank: sum(ranks[rank]))
    parts, m = ranks[binding], plan.micro_batches
    compute = parts.products + parts.attention + parts.experts + parts.passes + parts.recompute
    pp = m * between_stages(plan, cluster, binding)
    busy = m * sum(parts) + pp
    bubble = pipeline_bubble(plan.config.parallel, plan.micro_batches) if plan.pp > 1 else 0.0
    waits = busy * bubble / (1 - bubble)
    dp = engine_seconds(plan, cluster, binding, compute)
    optimizer = optimizer_seconds(plan, cluster, binding)
    straggle = cluster.efficiency.straggle * (busy + waits) * (plan.dp > 1 and plan.world > cluster.devices_per_node)
    per_step = {name: m * part for name, part in parts._asdict().items()}
    return StepTime(**per_step, pp=pp, dp=dp, optimizer=optimizer, bubble=waits, straggle=straggle)


# Layers and ends ----------------------------------------------------------------------------------------------------------


def _rank_parts(plan: Plan, cluster: Cluster, rank: int, imbalance: float, kinds: dict[LayerKind, Parts]) -> Parts:
    """Of all stages of a pipeline rank."""
    total = Parts()
    for stage in plan.stages_of(rank):
        for kind, count in plan.cut.counts[stage].items():
            if kind not in kinds:
                kinds[kind] = _layer_parts(plan, cluster, *kind, imbalance)
            total = total.plus(kinds[kind], count)
        if stage == 0:  # rows of the embedding that other ranks hold: summed into shares, whose gradients are gathered
            size = plan.tokens * end_width(plan.model) * plan.element_bytes
            sums = collective_seconds(cluster, "all-gather", 2 * size, group(cluster, plan.tp, 1), 2)
            total = total.plus(Parts(tp=sums))
        if stage == plan.stage_count - 1:
            total = total.plus(_end_parts(plan, cluster))
    # each micro-batch's gradients, read in their own precision, are added to fp32 sums
    summed = (plan.element_bytes + 8) * plan.rank_elements(rank).total
    return total._replace(passes=total.passes + pass_seconds(cluster, summed))


def _layer_parts(plan: Plan, cluster: Cluster, first: bool, routed: bool, strided: bool, imbalance: float) -> Parts:
    """One layer: forward and backward, and forward again where it is recomputed."""
    model, recompute = plan.model, plan.config.parallel.recompute
    alone = recompute == "stream" and plan.streams > 1
    streams, times = (1, plan.streams) if alone else (plan.streams, 1)
    tokens = plan.tokens / (model.altup.stride if strided else 1)
    before = 1 if first and not alone else streams
    d, q, kv = model.width, plan.query_width, plan.key_width
    products = product_seconds(cluster, tokens * before, q, d) + 2 * product_seconds(cluster, tokens * before, kv, d)
    products += product_seconds(cluster, tokens * streams, d, q)
    experts, ep, etp = 0.0, 0.0, 0.0
    if routed:
        experts, ep, etp = _routed(plan, cluster, tokens / plan.tp * streams, imbalance)
        width = model.experts.shared * (model.experts.width or 0) / plan.tp
    else:
        width = plan.ffn_width
    products += 3 * product_seconds(cluster, tokens * streams, width, d)
    keys = plan.visible_keys / (model.altup.stride if strided else 1) + model.streams.prefix_tokens * (model.streams.count > 1)
    # cp ranks have a share of the tokens, each of which sees all its keys; ulysses ranks a share of the heads: the same products
    attention = 4 * tokens * streams * q * keys / (cluster.peak_flops * cluster.efficiency.attention)
    attention += 2 * cluster.kernel_seconds
    passes = _passes(plan, cluster, tokens, streams, routed, width)
    again = recompute == "layer" or alone
    messages = 3 if again else 2
    tp = _tensor_messages(plan, cluster, tokens, before, streams, routed, messages) + etp * messages
    cp = _context_messages(plan, cluster, tokens, before, streams)
    forward = products + attention + experts + passes
    return Parts(
        products * (1 + BACKWARD) * times,
        attention * (1 + ATTENTION_BACKWARD) * times,
        experts * (1 + BACKWARD) * times,
        passes * (1 + BACKWARD) * times,
        forward * again * times,
        tp * times,
        cp * messages * times,
        0.0,
        ep * messages * times,
    )


def _passes(plan: Plan, cluster: Cluster, tokens: float, streams: float, routed: bool, width: float) -> float:
    """Element-wise parts of a forward pass: norms, rotary embedding, SwiGLU, sums, copies for experts, blocks."""
    model, e, d = plan.model, plan.element_bytes, plan.model.width
    share = tokens / plan.tp * streams
    moved = share * d * (2 * 2 + 2 * 3)  # two norms read and write, two sums read twice and write
    moved += tokens * streams * (2 * (plan.query_width + plan.key_width) + 3 * width)
    if routed:
        k, hidden = model.experts.per_token, model.experts.width or 0
        moved += share * (2 * (1 + k) * d + 3 * k * hidden + 2 * d)  # there, back, SwiGLU; the router's fp32 copy
    blocks = model.altup.blocks
    moved += share * d * (2 * blocks + 1) * (blocks > 1)
    eager = plan.config.compile == "off" or plan.zero == 3 or (plan.pp > 1 and plan.config.parallel.schedule in SPLIT_BACKWARD)
    return pass_seconds(cluster, e * moved * (EAGER if eager else 1.0), 12 if eager else 6)


def _routed(plan: Plan, cluster: Cluster, rows: float, imbalance: float) -> tuple[float, float, float]:
    """Of a forward pass: grouped products, messages over ep, messages over tp for experts whose width is split."""
    model, experts, e = plan.model, plan.model.experts, plan.element_bytes
    assert experts.width
    d, copies = model.width, rows * experts.per_token
    here = experts.count // plan.ep
    received = copies * imbalance * plan.etp
    width = experts.width / plan.etp
    one = product_seconds(cluster, received / here, width, d, here) / cluster.efficiency.grouped
    router = product_seconds(cluster, rows, experts.count, d) if experts.router != "hash" else 0.0
    members = group(cluster, plan.ep, plan.tp if plan.etp > 1 else 1)
    moved = 2 * copies * imbalance * d * e
    ep = collective_seconds(cluster, "all-to-all", moved, members, 2)
    if experts.shared and plan.ep > 1:  # rows leave while the shared experts are computed
        shared = 3 * product_seconds(cluster, rows * plan.tp, experts.shared * experts.width / plan.tp, d)
        ep -= min(ep / 2, shared) * cluster.efficiency.overlap
    if experts.scope == "global" and experts.router != "hash":
        sums = 1 + (experts.sinkhorn_iterations if experts.router == "s_base" else 0)
        stage = group(cluster, plan.data_shards * plan.tp, 1)
        ep += collective_seconds(cluster, "all-reduce", sums * 8.0 * model.streams.count * experts.count, stage, sums)
    tensor = group(cluster, plan.etp, 1)
    etp = collective_seconds(cluster, "all-gather", received * d * e, tensor) * 2
    return 3 * one + router, ep, etp


def _tensor_messages(
    plan: Plan, cluster: Cluster, tokens: float, before: float, streams: float, routed: bool, passes: int
) -> float:
    """Gathers before attention and feed-forward, scatters behind them, in two or three passes; experts need none, but the shared ones.
    What is computed again stops before its last scatter.
    """
    members = group(cluster, plan.tp, 1)
    size = tokens * plan.model.width * plan.element_bytes
    dense = not routed or plan.model.experts.shared > 0
    volume = passes * (before + streams + 2 * streams * dense) - streams * (passes > 2 and dense)
    return collective_seconds(cluster, "all-gather", size * volume, members, passes * (2 + 2 * dense))


def _context_messages(plan: Plan, cluster: Cluster, tokens: float, before: float, streams: float) -> float:
    members, e = group(cluster, plan.cp, plan.tp), plan.element_bytes
    if plan.config.parallel.context == "all_gather":
        volume = tokens * plan.cp * before * 2 * plan.key_width * e
        return collective_seconds(cluster, "all-gather", volume, members)
    volume = tokens * e * (before * (plan.query_width + 2 * plan.key_width) + streams * plan.query_width)
    return collective_seconds(cluster, "all-to-all", volume, members, 2)


def _end_parts(plan: Plan, cluster: Cluster) -> Parts:
    """Aggregator, head and loss, forward and backward: the loss computes its gradients at once."""
    model, ends, e = plan.model, end_width(plan.model), plan.element_bytes
    tokens = plan.tokens / plan.stream
    products = 3 * product_seconds(cluster, tokens, plan.vocabulary, ends)
    chunks = -(-tokens // CHUNK)
    # logits written, read twice, their gradient; and each chunk's part of the weight's gradient is added in fp32
    moved = tokens * plan.vocabulary * 4 * e + chunks * plan.vocabulary * ends * (2 * e + 8)
    stream = 0.0
    if model.streams.count > 1:
        products += 3 * product_seconds(cluster, plan.tokens / plan.tp, model.width, ends * plan.streams)
        moved += 6 * plan.tokens / plan.tp * plan.streams * ends * e
        members = group(cluster, plan.stream, plan.cp * plan.tp)
        volume = plan.tokens / plan.tp * ends * e
        stream = 2 * collective_seconds(cluster, "all-reduce", volume, members, 1)
        stream += 2 * collective_seconds(cluster, "all-gather", volume, members, 1)
        stream += collective_seconds(cluster, "reduce-scatter", 4 * volume / e, members, 1)  # for streams/correlation, fp32
    tensor = collective_seconds(cluster, "all-gather", 2 * tokens * ends * e, group(cluster, plan.tp, 1), 2)
    return Parts(products=products, passes=pass_seconds(cluster, moved, 8), tp=tensor, stream=stream)
