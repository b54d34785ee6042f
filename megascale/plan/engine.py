"""Seconds of what is not a layer's: messages between pipeline stages, the engine's gradients and weights, the optimizer.

e bytes of an element.
"""

from __future__ import annotations

from megascale.config.layout import rank_of_stage
from megascale.parallel.zero_traffic import BUCKET, MOST_LIVE
from megascale.plan.cluster import Cluster
from megascale.plan.costs import BACKWARD, Group, collective_seconds, group, pass_seconds, send_seconds
from megascale.plan.rank import Plan


def between_stages(plan: Plan, cluster: Cluster, rank: int) -> float:
    """What a pipeline rank waits for of its states and gradients, for one micro-batch: each border costs it one message."""
    if plan.pp == 1:
        return 0.0
    stages, last = plan.stages_of(rank), plan.stage_count - 1
    size = plan.tokens / plan.tp * plan.streams * plan.model.altup.blocks * plan.model.width * plan.element_bytes
    parallel = plan.config.parallel
    neighbours = [near for stage in stages for near in (stage - 1, stage + 1) if 0 <= near <= last]
    messages = sum(rank_of_stage(near, parallel) != rank for near in neighbours)
    return messages * send_seconds(cluster, size, plan.layout.step("pp"))


def _data_groups(plan: Plan, cluster: Cluster) -> tuple[Group, Group]:
    """The ranks that sum the gradients of what all data ranks hold, and of experts."""
    experts = group(cluster, plan.expert_shards, plan.ep * plan.etp)
    return group(cluster, plan.data_shards, plan.tp), experts


def engine_seconds(plan: Plan, cluster: Cluster, rank: int, compute: float) -> float:
    """Gradients and weights that are waited for; `compute` is a micro-batch's computation.

    ZeRO 1 and 2 all-reduce fp32 gradients and gather the new weights (DeepSpeed's default); ZeRO 3 reduce-scatters gradients, and gathers
    weights beside the computation: once a step, or for each forward and backward pass where they are too many to stay.
    """
    elements, e = plan.rank_elements(rank), plan.element_bytes
    dense, routed = elements.total - elements.experts, elements.experts
    rows = tuple(zip((dense, routed), _data_groups(plan, cluster), strict=True))
    kind = "reduce-scatter" if plan.zero == 3 else "all-reduce"
    gradients = sum(collective_seconds(cluster, kind, 4.0 * count, members, -(-count // BUCKET)) for count, members in rows)
    if plan.pp == 1:  # beside the backward pass of the last micro-batch
        last_bucket = gradients * min(1.0, BUCKET / max(elements.total, 1))
        backward = compute * BACKWARD / (1 + BACKWARD)
        gradients = max(last_bucket, gradients - cluster.efficiency.overlap * min(backward, gradients))
    if plan.zero == 0:
        return gradients
    weights = sum(collective_seconds(cluster, "all-gather", float(e * count), members) for count, members in rows)
    if plan.zero < 3:
        return gradients + weights
    if elements.total > MOST_LIVE:
        weights *= 2 * plan.micro_batches
    return gradients + weights - cluster.efficiency.overlap * min(weights, plan.micro_batches * compute)


def optimizer_seconds(plan: Plan, cluster: Cluster, rank: int) -> float:
    """The norm of all gradients, the update of this rank's part, and gradients set to zero. Muon: its products on whole matrices."""
    elements, muon = plan.rank_elements(rank), plan.config.optimizer.muon
    shards, expert_shards = (plan.data_shards, plan.expert_shards) if plan.zero else (1, 1)
    mine = (elements.total - elements.experts) / shards + elements.experts / expert_shards
    seconds = pass_seconds(cluster, 8.0 * elements.total + (28 + plan.element_bytes) * mine, 4)
    if plan.config.optimizer.name == "muon":
        iterations = muon.iterations if muon is not None else 5
        matrices = elements.matrices / shards + elements.experts / expert_shards
        flops = iterations * 6.0 * plan.model.width * matrices  # two products with the matrix, one of its square, per iteration
        seconds += flops / (cluster.peak_flops * cluster.efficiency.matmul)
    return seconds
