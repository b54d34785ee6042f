"""Megatron-LM's GPT as published: its layer, memory and step time by the planner's own costs, to check these on published runs.

The model is not ours: as many key/value heads as heads, a GELU feed-forward four times as wide, LayerNorm, dropout, attention with the
scores in memory, tied embeddings. b sequences of a micro-batch, s tokens each, h width, a heads, t tensor-parallel ranks, L layers, V
vocabulary; fp16. Formulas of activations: Korthikanti et al. 2022 (arXiv 2205.05198, Equations 1-6 and Table 2); of FLOPs: Narayanan
et al. 2021 (arXiv 2104.04473, Equation 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megascale.plan.cluster import Cluster
from megascale.plan.costs import collective_seconds, group, pass_seconds, product_seconds, send_seconds

SEQUENCE, VOCABULARY = 2048, 51200
Recompute = Literal["none", "selective", "full"]
OPTIMIZER_BYTES = 30
"""Read and written for a parameter in a step: fp32 gradient, master and two moments, and the fp16 weight."""


@dataclass(frozen=True)
class Published:
    """One run of a published table."""

    layers: int
    width: int
    heads: int
    gpus: int
    tp: int
    pp: int
    batch: int
    micro_batch: int = 1
    interleave: int = 1
    recompute: Recompute = "full"
    sequence_parallel: bool = False
    zero: bool = False
    """ZeRO 3 over all GPUs, no other parallelism"""

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tp * self.pp)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each data-parallel rank."""
        return self.batch // (self.dp * self.micro_batch)

    @property
    def parameters(self) -> float:
        """P = 12 L h^2 (1 + 13/(12 h) + (V + s)/(12 L h)) (arXiv 2104.04473, Equation 2)."""
        h, layers = self.width, self.layers
        return 12 * layers * h**2 * (1 + 13 / (12 * h) + (VOCABULARY + SEQUENCE) / (12 * layers * h))

    @property
    def paper_flops(self) -> float:
        """Of an iteration, a full recomputation counted (arXiv 2104.04473, Equation 3)."""
        h = self.width
        tokens = self.batch * SEQUENCE
        return 96 * tokens * self.layers * h**2 * (1 + SEQUENCE / (6 * h) + VOCABULARY / (16 * self.layers * h))


# Memory -------------------------------------------------------------------------------------------------------------------


def state_bytes(run: Published) -> float:
    """Weights, gradients and Adam's state of a stage's layers, without embeddings (the published figures leave them out: they are those of
    the layers to four digits): 18 bytes a parameter, fp16 weights with fp32 gradients, master and moments.
    """
    return 18 * run.layers / run.pp * (12 * run.width**2 + 13 * run.width) / run.tp


def layer_bytes(run: Published) -> float:
    """Activations of one layer and one micro-batch (arXiv 2205.05198, Table 2)."""
    s, b, h, t = SEQUENCE, run.micro_batch, run.width, run.tp
    scores = 5 * run.heads * s / h / t * (run.recompute == "none")
    if run.recompute == "full":
        return 2.0 * s * b * h / (t if run.sequence_parallel else 1)
    rest = 34 / t if run.sequence_parallel else 10 + 24 / t
    return s * b * h * (rest + scores)


def activation_bytes(run: Published) -> float:
    """Of the first stage: L layers' worth with 1F1B, (1 + (p-1)/(p v)) times that when interleaved (section 4.2.3), and both ends."""
    s, b, h, t, p = SEQUENCE, run.micro_batch, run.width, run.tp, run.pp
    stored = run.layers * layer_bytes(run) * (1 + (p - 1) / (p * run.interleave) if run.interleave > 1 else 1)
    dropout = s * b * h * p / (t if run.sequence_parallel else 1)  # mask of the embedding's dropout, for p micro-batches
    ends = 4 * s * b * h / t * (1 + VOCABULARY / h) * (p == 1)
    return stored + dropout + ends


# Time ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and one micro-batch on a GPU, forward and backward apart."""

    forward: float
    backward: float
    attention_again: float
    """attention's scores, softmax and weighted sum once more, without their products"""
    messages: float
    """tensor-parallel sums, of one direction"""


def layer_time(run: Published, cluster: Cluster) -> LayerTime:
    """One layer by its kernels."""
    s, b, h, t = SEQUENCE, run.micro_batch, run.width, run.tp
    rows, heads, head_dim = b * s, run.heads / t, h // run.heads
    products = (
        product_seconds(cluster, rows, 3 * h / t, h)
        + product_seconds(cluster, rows, h, h / t)
        + product_seconds(cluster, rows, 4 * h / t, h)
        + product_seconds(cluster, rows, h, 4 * h / t)
    )
    scores = product_seconds(cluster, s, s, head_dim, b * heads) + product_seconds(cluster, s, head_dim, s, b * heads)
    square = b * heads * s**2
    # masked softmax reads and writes, dropout reads and writes and makes a mask
    softmax, softmax_back = pass_seconds(cluster, 9 * square, 2), pass_seconds(cluster, 11 * square, 2)
    share = t if run.sequence_parallel else 1
    # two LayerNorms; twice bias, dropout and sum; of the split parts GELU and the turns of q, k, v
    narrow, split = 22 * rows * h / share, 28 * rows * h / t
    passes = pass_seconds(cluster, narrow + split, 8)
    members = group(cluster, t, 1)
    messages = 2 * collective_seconds(cluster, "all-reduce", 2.0 * rows * h, members)
    attention = scores + softmax
    return LayerTime(
        products + attention + passes + messages,
        2 * products + 2 * scores + softmax_back + 2 * passes + messages,
        attention,
        messages,
    )


def iteration_seconds(run: Published, cluster: Cluster) -> float:
    """Of one iteration: the last stage's micro-batches and the bubble, messages between stages, gradients, optimizer."""
    if run.zero:
        return _zero_seconds(run, cluster)
    layers = run.layers / run.pp
    one = layer_time(run, cluster)
    again = {"none": 0.0, "selective": one.attention_again, "full": one.forward}[run.recompute]
    stage = layers * (one.forward + one.backward + again)
    head = _head_seconds(run, cluster)
    m, p, v = run.micro_batches, run.pp, run.interleave
    state = 2.0 * run.micro_batch * SEQUENCE * run.width
    # each rank sends its share to the next node, which gathers it (arXiv 2104.04473, section 4.1)
    send = send_seconds(cluster, state / run.tp, run.tp * run.dp)
    send += 0 if run.sequence_parallel else collective_seconds(cluster, "all-gather", state, group(cluster, run.tp, 1))
    exchange = 2 * v * send * (p > 1)
    steady = m * (stage + head + exchange)
    bubble = (p - 1) / v * stage + (p - 1) * exchange / v
    waits = 1 + cluster.efficiency.straggle * (run.dp > 1)
    return (steady + bubble) * waits + _gradients_and_optimizer(run, cluster)


def _head_seconds(run: Published, cluster: Cluster) -> float:
    """Logits, their loss in fp32, and the gradients of both; the embedding's rows."""
    rows, columns = run.micro_batch * SEQUENCE, VOCABULARY / run.tp
    products = 3 * product_seconds(cluster, rows, columns, run.width)
    return products + pass_seconds(cluster, 24 * rows * columns, 6)


def _gradients_and_optimizer(run: Published, cluster: Cluster) -> float:
    mine = run.parameters / (run.tp * run.pp)
    members = group(cluster, run.dp, run.tp)
    return collective_seconds(cluster, "all-reduce", 2 * mine, members) + pass_seconds(cluster, OPTIMIZER_BYTES * mine)


def _zero_seconds(run: Published, cluster: Cluster) -> float:
    """ZeRO 3: weights gathered for the forward pass and for the backward pass, gradients scattered (arXiv 1910.02054, section 7.2.2).

    Of the shorter of messages and computation only `overlap` goes beside the longer.
    """
    one = layer_time(run, cluster)
    computed = run.layers * (2 * one.forward + one.backward) + _head_seconds(run, cluster)
    members = group(cluster, run.gpus, 1)
    # one port a rank: with DeepSpeed's many small gathers a node's ports were not used together
    alone = replace(members, per_node=1)
    sent = collective_seconds(cluster, "all-gather", 3 * 2 * run.parameters, alone, 3 * run.layers)
    optimizer = pass_seconds(cluster, OPTIMIZER_BYTES * run.parameters / run.gpus)
    exposed = (1 - cluster.efficiency.overlap) * min(computed, sent)
    return run.micro_batches * (max(computed, sent) + exposed) * (1 + cluster.efficiency.straggle) + optimizer


def fastest_micro_batch(run: Published, cluster: Cluster) -> Published:
    """The run with the micro-batch, a power of two, that is fastest and fits the memory: for tables that do not print it."""
    best = run
    for power in range(6):
        size = 2**power
        candidate = replace(run, micro_batch=size)
        if run.batch % (run.dp * size) or (run.pp > 1 and candidate.micro_batches < run.pp):
            continue
        if (
            state_bytes(candidate) + activation_bytes(candidate) + layer_bytes(replace(candidate, recompute="none"))
            > cluster.usable_bytes
        ):
            continue
        if iteration_seconds(candidate, cluster) < iteration_seconds(best, cluster):
            best = candidate
    return best


def fewest_stages(layers: int, pp: int) -> int:
    """Stages a rank of an interleaved schedule whose number is not printed: the smallest above one that divides the layers evenly."""
    if pp == 1:
        return 1
    each = layers // pp
    return next((v for v in range(2, each + 1) if each % v == 0), 1)


def bytes_share(run: Published, of: Published) -> float:
    """Activations of a layer as a share of another way's."""
    return layer_bytes(run) / layer_bytes(of)


def gibibytes(size: float) -> float:
    """Bytes in GiB."""
    return size / math.pow(2, 30)
