"""`python -m benchmarks parallel`: its arithmetic by hand, and one small pipeline whose layers sleep, on real ranks."""

from __future__ import annotations

from typing import get_args

import pytest

from benchmarks.bubble import FORMULAS, LAYERS_A_RANK, SCHEDULES, SleptStep, idle_share, length, pipeline_config, row, slept_steps
from benchmarks.layout_runs import CROSSING, TWO_RANKS, bytes_a_second, over_one
from benchmarks.traffic import by_axis, traffic_row
from megascale.config.layout import pipeline_bubble
from megascale.config.schema import Parallel
from megascale.parallel.ledger import Entry
from ranks import RankPool


def step(begin: float, end: float, slept: float, computed: float = 0.0) -> SleptStep:
    return SleptStep(begin, end, slept, computed, {})


def test_ranks_idle_from_the_first_begin_to_the_last_end() -> None:
    assert idle_share([step(0.0, 9.0, 6.0), step(1.0, 10.0, 4.0, 1.0)]) == pytest.approx(0.45)


# p = 4 pipeline ranks, m = 8 micro-batches, v stages a rank; in forward passes of a stage
@pytest.mark.parametrize(
    ("schedule", "waits", "works"),
    [
        ("1f1b", 3 * 3, 3 * 8),
        ("interleaved, v=2", 3 * 3, 3 * 8 * 2),
        ("zero_bubble", 3, 3 * 8),
        ("zero_bubble, v=2", 3, 3 * 8 * 2),
        ("zbv", 3, 6 * 8),
        ("dualpipev", 2 * 3, 6 * 8),
    ],
)
def test_a_row_has_the_shortest_step_beside_the_papers_share(schedule: str, waits: int, works: int) -> None:
    share = waits / (waits + works)
    best, disturbed = step(0.0, 5.0, 5 * (1 - share)), step(0.0, 9.0, 5 * (1 - share))
    found = row(4, schedule, 8, 0.016, [[disturbed, best]] * 4)
    assert (found["idle"], found["formula"], found["step_s"]) == pytest.approx((share, share, 5.0))
    assert schedule in FORMULAS


def test_every_schedule_is_measured() -> None:
    names = get_args(Parallel.model_fields["schedule"].annotation)
    assert {settings["schedule"] for settings in SCHEDULES.values()} == set(names)
    assert {f"pp 2, {name}" for name in names} <= {layout.name for layout in TWO_RANKS}


def test_layouts_are_compared_with_one_process() -> None:
    rows = over_one([{"layout": "one", "step_s": 2.0, "cpu_s": 4.0}, {"layout": "dp 2", "step_s": 3.0, "cpu_s": 5.0}])
    assert [(r["step_over_one"], r["cpu_over_one"]) for r in rows] == [(1.0, 1.0), (1.5, 1.25)]


def test_rates_are_those_of_tc() -> None:
    assert [bytes_a_second(rate) for rate in ("200mbit", "1gbit", "800kbit")] == [25e6, 125e6, 1e5]


def test_bytes_stand_beside_each_other() -> None:
    entries = [Entry("tp", "all-gather", 2, 3, 6_000_000), Entry("world", "all-reduce", 2, 1, 1_000_000)]
    assert by_axis(entries) == {"tp": 3e6, "world": 1e6}
    found = traffic_row(CROSSING[0], {"tp": 4e6}, {"ledger": by_axis(entries), "interface": 5e6})
    assert (found["axis"], found["axis_mb"], found["ledger_mb"]) == ("tp", 3.0, 4.0)
    assert (found["ledger_over_dry_run"], found["interface_over_ledger"]) == (1.0, 1.25)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "dualpipev"])
def test_a_sleeping_pipeline_does_all_work_and_waits_no_less_than_the_formula(ranks: RankPool, schedule: str) -> None:
    size, micro_batches, seconds = 2, 4, 0.004
    by_rank = ranks.run(slept_steps, schedule, micro_batches, seconds, 2, world_size=size)
    work = LAYERS_A_RANK * micro_batches
    share = pipeline_bubble(pipeline_config(size, schedule, micro_batches).parallel, micro_batches)
    for steps in zip(*by_rank, strict=True):
        assert [found.parts for found in steps] == [{"forward": work, "input": work, "weight": work}] * size
        # not a matter of speed: sleeps are never shorter than asked for, and those that depend on each other add up
        assert length(steps) >= 3 * work * seconds / (1 - share)
