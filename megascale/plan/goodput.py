"""What failures cost: the best checkpoint interval and the share of the time that trains.

Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps" (Future Generation Computer Systems 22): the
interval by its Equation 37, the time by its Equation 20 (failures are a Poisson process, also during restarts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megascale.plan.cluster import Cluster

LEAST_SHARE = 1e-6
"""Of wall time that trains: with less a run never finishes."""
SAVED_BYTES = 12
"""Of a parameter in a checkpoint: fp32 master and two moments."""


@dataclass(frozen=True)
class Goodput:
    """Of a run on many nodes."""

    hours_between_failures: float
    """of the whole run"""
    checkpoint_seconds: float
    """for which training waits, each time"""
    interval_seconds: float
    """of training between two checkpoints"""
    share: float
    """of wall time that trains: the rest is checkpoints, lost work and restarts"""

    @property
    def finishes(self) -> bool:
        """Whether failures leave the time to train at all."""
        return self.share >= LEAST_SHARE


def goodput(cluster: Cluster, nodes: int, parameters: int, background: bool) -> Goodput:
    """The best interval and what it leaves.

    Args:
        nodes: of the run; any failure of one stops all.
        parameters: of the model.
        background: training waits only for the copy to host memory; then a checkpoint cannot begin before the last is written.
    """
    size = float(SAVED_BYTES * parameters)
    written = size / nodes / cluster.checkpoint_bandwidth
    moved = size / (nodes * cluster.devices_per_node) / cluster.host_bandwidth if background else written
    cost = cluster.checkpoint_seconds + moved
    mean = 3600.0 * cluster.hours_between_failures / nodes
    interval = max(best_interval(cost, mean), written if background else 0.0)
    return Goodput(mean / 3600, cost, interval, useful_share(interval, cost, mean, cluster.restart_seconds))


def best_interval(cost: float, mean: float) -> float:
    """Seconds of work between checkpoints that take `cost` seconds, with a failure every `mean` seconds (Equation 37).

    Its first term is Young's sqrt(2 cost mean) (Young 1974, "A first order approximation to the optimum checkpoint interval").
    """
    if cost >= 2 * mean:
        return mean
    root = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + root / 3 + root**2 / 9) - cost


def useful_share(interval: float, cost: float, mean: float, restart: float) -> float:
    """Work over wall time, tau / (M e^(R/M) (e^((tau + delta)/M) - 1)) (Equation 20)."""
    if interval <= 0:
        return math.exp(-restart / mean)
    exponent = (interval + cost) / mean
    if exponent + restart / mean > 500:  # the exponentials would overflow
        return 0.0
    return interval / (mean * math.exp(restart / mean) * math.expm1(exponent))
