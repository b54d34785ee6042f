"""Seconds of the parts that every step is made of: matrix products, passes over memory, and messages.

Matrix products follow a roofline (Williams et al. 2009) whose roof is lower for small products: efficiency saturates in the smallest
dimension, and the last tiles of a product do not fill the device. Collectives follow the ring algorithms that the ledger of the layouts
counts by (Thakur et al. 2005), at the bandwidth of the slowest link on the ring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megascale.plan.cluster import Cluster

TILE = 128
"""Rows and columns of the result that a processor computes at a time."""
BACKWARD = 2.0
"""A backward pass over the forward pass: the gradients of two factors."""
PASSES = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
"""How often (n-1)/n of the bytes of a collective leave a rank."""


@lru_cache(maxsize=2**16)
def product_seconds(
    cluster: Cluster, rows: float, columns: float, inner: float, count: float = 1.0, element_bytes: int = 2
) -> float:
    """Of `count` products [rows, inner] x [inner, columns] done as one kernel."""
    if min(rows, columns, inner, count) <= 0:
        return 0.0
    flops = 2.0 * rows * columns * inner * count
    smallest = min(rows, columns, inner)
    saturation = smallest / (smallest + cluster.efficiency.matmul_half)
    rate = cluster.peak_flops * cluster.efficiency.matmul * saturation * tile_use(cluster, rows, columns, count)
    moved = element_bytes * count * (rows * inner + inner * columns + rows * columns)
    return max(flops / rate, moved / (cluster.memory_bandwidth * cluster.efficiency.memory)) + cluster.kernel_seconds


def tile_use(cluster: Cluster, rows: float, columns: float, count: float = 1.0) -> float:
    """Share of the processors' time that falls on tiles of the result: the last wave of tiles may be nearly empty."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE) * count
    if tiles < cluster.processors:
        return 1.0  # a product of few tiles is split along its inner dimension; what that costs is in the saturation
    return tiles / (math.ceil(tiles / cluster.processors) * cluster.processors)


def pass_seconds(cluster: Cluster, moved: float, kernels: float = 1.0) -> float:
    """Of element-wise kernels that read and write so many bytes in all."""
    return moved / (cluster.memory_bandwidth * cluster.efficiency.memory) + kernels * cluster.kernel_seconds


@dataclass(frozen=True)
class Group:
    """Ranks that exchange: how many, and how many of them share a node."""

    ranks: int
    per_node: int

    @property
    def in_node(self) -> bool:
        """All of them do."""
        return self.per_node >= self.ranks


def group(cluster: Cluster, ranks: int, step: int, inside: int = 1) -> Group:
    """The ranks of an axis.

    Args:
        ranks: how many.
        step: how far apart neighbours are, in ranks of the world.
        inside: the axis is made of blocks of so many ranks that are one apart (experts' ranks, which count tp too).
    """
    span = max(cluster.devices_per_node // step, 1) * inside
    return Group(ranks, min(ranks, max(span, 1)))


def link(cluster: Cluster, members: Group) -> tuple[float, float]:
    """Bandwidth of a ring over a group, bytes/s of a rank, and latency of a message. Ranks of a node use their network ports together."""
    within = cluster.intra_node_bandwidth * cluster.efficiency.intra_node
    if members.in_node:
        return within, cluster.intra_node_latency
    between = cluster.inter_node_bandwidth * cluster.efficiency.inter_node * members.per_node
    return min(within, between), cluster.inter_node_latency


def collective_seconds(cluster: Cluster, kind: str, volume: float, members: Group, calls: float = 1.0) -> float:
    """Of collectives over a group.

    Args:
        kind: a key of `PASSES`.
        volume: bytes of the whole tensors: results of all-gathers, inputs of the others, all calls together.
        calls: how many; each costs the latency of a tree of the group's depth.
    """
    if members.ranks == 1 or volume <= 0:
        return 0.0
    n = members.ranks
    bandwidth, latency = link(cluster, members)
    depth = math.ceil(math.log2(n))
    waits = calls * depth * latency
    if kind == "all-to-all" and not members.in_node:
        # each rank's own port carries what goes to other nodes, while the rest travels inside
        across = volume * (n - members.per_node) / n
        inside = volume * max(members.per_node - 1, 0) / n
        ports = cluster.inter_node_bandwidth * cluster.efficiency.inter_node
        return max(across / ports, inside / (cluster.intra_node_bandwidth * cluster.efficiency.intra_node)) + waits
    return PASSES[kind] * volume * (n - 1) / n / bandwidth + waits


def send_seconds(cluster: Cluster, volume: float, step: int, messages: float = 1.0) -> float:
    """Of messages to a rank that is `step` ranks away, which is on another node where the step is no less than a node."""
    members = Group(2, 1 if step >= cluster.devices_per_node else 2)
    bandwidth, latency = link(cluster, members)
    return volume / bandwidth + messages * latency


def median(values: Sequence[float]) -> float:
    """The middle one."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
