"""N and P of the published routed runs, to the last parameter."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path
from typing import Literal

import pytest

from megascale.laws.routed_counts import Router, all_parameters, dense_parameters

ROUTED = os.environ.get("MEGASCALE_ROUTED_LM", "")
ROUTERS: dict[str, Router] = {"S-Base": "s_base", "RL-R": "rl_r", "Hash": "hash", "Dense": "s_base"}
SIZES = {
    16_527_360: (512, 6, 8, 32),
    27_279_360: (512, 8, 8, 64),
    57_369_600: (640, 10, 12, 64),
    132_163_584: (896, 12, 16, 64),
    368_123_904: (1536, 12, 12, 128),
    1_308_819_456: (2048, 24, 16, 128),
}


@pytest.mark.parametrize("count", SIZES)
def test_the_six_dense_sizes(count: int) -> None:
    assert dense_parameters(*SIZES[count]) == all_parameters(*SIZES[count], experts=1) == count


@pytest.mark.parametrize(
    ("router", "experts", "count"),
    [("s_base", 2, 481_388_544), ("hash", 16, 2_066_964_480), ("rl_r", 16, 2_068_735_104), ("rl_r", 128, 14_753_342_592)],
)
def test_routed_models_of_370m(router: Literal["s_base", "rl_r", "hash"], experts: int, count: int) -> None:
    assert all_parameters(*SIZES[368_123_904], experts=experts, router=router) == count


@pytest.mark.skipif(not Path(ROUTED).is_file(), reason="MEGASCALE_ROUTED_LM does not name the published curves.csv.gz")
def test_every_published_run() -> None:
    """A dense model with f times the feed-forward FLOPs counts as one with f experts."""
    with gzip.open(ROUTED, "rt") as file:
        runs = {tuple(row.items())[7:] for row in csv.DictReader(file)}
    for run in map(dict, runs):
        size = tuple(int(run[key]) for key in ("d_model", "num_blocks", "num_heads", "kqv_size"))
        assert len(size) == 4
        experts = max(int(run["num_experts"]), round(float(run["flop_increase"])))
        frequency, router = float(run["routing_frequency"]), ROUTERS[run["router_type"]]
        assert dense_parameters(*size) == float(run["dense_parameter_count"])
        assert all_parameters(*size, experts, frequency, router) == float(run["total_parameter_count"]), run
