"""Every router trains the run of one process in every kind of layout: choices, drops, biases and rewards are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import ADAMW, Result, problems, train
from megascale.checkpoint.load import CheckpointReader
from megascale.config.schema import Config
from megascale.train.build import Parts
from ranks import RankPool
from runs import Run, one_process, tiny_config, train_tiny

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
LAYOUTS = {
    "dp2": (2, "parallel={dp: 2, zero_stage: 0}"),
    "tp2": (2, "parallel={tp: 2, zero_stage: 0}"),
    "ep2": (2, "parallel={ep: 2, zero_stage: 0}"),
    "pp2": (2, "parallel={pp: 2, zero_stage: 0}"),
    "pp2-interleaved": (2, "parallel={pp: 2, schedule: interleaved, virtual_stages: 2, zero_stage: 0}"),
    "pp2-tp2-ep2-dp2": (8, "parallel={pp: 2, tp: 2, ep: 2, zero_stage: 0}"),
}
"""Name -> ranks, settings."""
ROUTERS = {
    "softmax with a capacity": ("model.experts.capacity_factor=0.8",),
    "sigmoid": ("model.experts.router=sigmoid", "model.experts.bias_rate=0.02"),
    "s_base": ("model.experts.router=s_base",),
    "rl_r": (
        "model.experts.router=rl_r",
        "model.experts.policy_loss=1",
        "model.experts.baseline_loss=0.1",
        "model.experts.entropy_bonus=0.1",
    ),
    "hash": ("model.experts.router=hash", "model.experts.hash_map=balanced"),
}
LOADS = ("load_max_over_mean", "load_entropy", "idle_experts")


class References:
    """Runs of one process, each trained when first asked for."""

    def __init__(self, ranks: RankPool, folder: Path, corpus: Path):
        self.ranks, self.folder, self.corpus = ranks, folder, corpus
        self.results: dict[tuple[str, ...], Result] = {}

    def __call__(self, *settings: str) -> Result:
        if settings not in self.results:
            name = f"one-{len(self.results)}"
            self.results[settings] = train(self.ranks, self.folder, self.corpus, 1, name, MODEL, *ADAMW, *settings)
        return self.results[settings]


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> References:
    return References(ranks, tmp_path_factory.mktemp("one"), tiny_corpus)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layout_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, router: str, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, *ROUTERS[router], parallel)
    assert problems(found, one(*ROUTERS[router])) == []


OTHER_RUNS = {
    "a stage without routers before one with": ("pp2", (*ROUTERS["rl_r"], "model.experts.every=4", "model.experts.offset=3")),
    "a stage without routers behind one with": ("pp2", (*ROUTERS["rl_r"], "model.experts.every=4", "model.experts.offset=0")),
    "bf16's router in fp32": ("tp2", (*ROUTERS["s_base"], "model.experts.sinkhorn_tolerance=0.05")),
    "one expert a token": ("ep2", (*ROUTERS["rl_r"], "model.experts.per_token=1")),
    "an odd number of experts": ("tp2", (*ROUTERS["s_base"], "model.experts.count=5", "model.experts.gate=sigmoid")),
    "validation": ("pp2-tp2-ep2-dp2", (*ROUTERS["rl_r"], "validation={every: 2, sequences: 19}")),
    "recomputed layers": ("pp2-tp2-ep2-dp2", (*ROUTERS["rl_r"], "model.experts.capacity_factor=0.8", "parallel.recompute=layer")),
    "a balance loss beside the bias": ("dp2", (*ROUTERS["sigmoid"], "model.experts.balance_loss=0.01")),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHER_RUNS)
def test_it_holds_for(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, what: str) -> None:
    layout, settings = OTHER_RUNS[what]
    world, parallel = LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, *settings, parallel)
    assert problems(found, one(*settings)) == []
