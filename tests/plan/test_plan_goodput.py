"""Checkpoint intervals are Young's and Daly's; failures cost what a simulation says."""

from __future__ import annotations

import math
import random

import pytest

from megascale.plan.cluster import load_cluster
from megascale.plan.goodput import best_interval, goodput, useful_share

H100 = load_cluster("h100")


def test_the_interval_is_youngs_where_checkpoints_are_cheap() -> None:
    assert best_interval(1.0, 1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)


@pytest.mark.parametrize(("cost", "mean"), [(10, 3600), (60, 7200), (300, 36000)])
def test_no_other_interval_is_much_better(cost: float, mean: float) -> None:
    best = useful_share(best_interval(cost, mean), cost, mean, 0)
    others = [useful_share(cost * 1.1**power, cost, mean, 0) for power in range(-20, 80)]
    assert best == pytest.approx(max(others), rel=1e-3)


def test_the_share_is_that_of_a_simulation() -> None:
    """Segments of work and a checkpoint, begun again at each failure, behind a restart that may fail too."""
    interval, cost, mean, restart, draw = 500.0, 30.0, 2000.0, 100.0, random.Random(1)
    wall, segments = 0.0, 20_000
    for _ in range(segments):
        while (failure := draw.expovariate(1 / mean)) < interval + cost:
            wall += failure
            while (again := draw.expovariate(1 / mean)) < restart:
                wall += again
            wall += restart
        wall += interval + cost
    assert useful_share(interval, cost, mean, restart) == pytest.approx(segments * interval / wall, rel=0.05)


def test_more_nodes_fail_more_often_and_waste_more() -> None:
    few, many = (goodput(H100, nodes, 10**11, background=True) for nodes in (16, 2048))
    assert few.hours_between_failures == pytest.approx(128 * many.hours_between_failures)
    assert 0.5 < many.share < few.share < 1


@pytest.mark.parametrize("hours", [1e-4, 1e-300])
def test_a_run_that_fails_all_the_time_never_finishes(hours: float) -> None:
    fragile = H100.model_copy(update={"hours_between_failures": hours})
    found = goodput(fragile, 2, 10**9, background=True)
    assert found.share == 0 and not found.finishes
    assert goodput(H100, 2, 10**9, background=True).finishes


def test_writing_in_the_background_wastes_less() -> None:
    waits, goes_on = (goodput(H100, 128, 10**11, background=flag) for flag in (False, True))
    assert goes_on.checkpoint_seconds < waits.checkpoint_seconds
    assert goes_on.share > waits.share
