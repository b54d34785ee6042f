"""Every router trains the run of one process in every kind of layout: choices, drops, biases and rewards are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layouts import ADAMW, References, Result, problems, saved, train
from megascale.checkpoint.weights import BUFFERS
from ranks import RankPool

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
ZERO = {f"zero{stage}": (2, f"parallel={{dp: 2, zero_stage: {stage}}}") for stage in (1, 3)}
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


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> References:
    return References(ranks, tmp_path_factory.mktemp("one"), tiny_corpus, MODEL, *ADAMW)


@pytest.mark.slow
# without --full every router in two layouts: tests/test_compositions.py has all pairs
@pytest.mark.parametrize(
    ("router", "layout"),
    [
        (router, name) if (i + j) % 4 == 0 else pytest.param(router, name, marks=pytest.mark.full)
        for i, router in enumerate(ROUTERS)
        for j, name in enumerate(LAYOUTS)
    ],
)
def test_a_layout_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, router: str, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, *ROUTERS[router], parallel)
    assert problems(found, one(*ROUTERS[router])) == []


OTHER_RUNS = {
    "a stage without routers before one with": ("pp2", (*ROUTERS["rl_r"], "model.experts.every=4", "model.experts.offset=3")),
    "a stage without routers behind one with": ("pp2", (*ROUTERS["rl_r"], "model.experts.every=4", "model.experts.offset=0")),
    "a tolerance": ("tp2", (*ROUTERS["s_base"], "model.experts.sinkhorn_tolerance=0.05")),
    "counts of each rank": ("pp2", (*ROUTERS["s_base"], "model.experts.scope=rank", "model.experts.capacity_factor=1.0")),
    "one expert a token": ("ep2", (*ROUTERS["rl_r"], "model.experts.per_token=1")),
    "an odd number of experts": ("tp2", (*ROUTERS["s_base"], "model.experts.count=5", "model.experts.gate=sigmoid")),
    "validation": ("pp2-tp2-ep2-dp2", (*ROUTERS["rl_r"], "validation={every: 2, sequences: 19}")),
    "recomputed layers": ("pp2-tp2-ep2-dp2", (*ROUTERS["rl_r"], "model.experts.capacity_factor=0.8", "parallel.recompute=layer")),
    "ZeRO 1": ("zero1", ROUTERS["rl_r"]),
    "ZeRO 3": ("zero3", ROUTERS["sigmoid"]),
    "a balance loss beside the bias": ("dp2", (*ROUTERS["sigmoid"], "model.experts.balance_loss=0.01")),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHER_RUNS)
def test_it_holds_for(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, what: str) -> None:
    layout, settings = OTHER_RUNS[what]
    world, parallel = {**LAYOUTS, **ZERO}[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, *settings, parallel)
    assert problems(found, one(*settings)) == []


def buffers(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return saved(folder / "runs" / name / "checkpoints" / f"step-{step:08d}", BUFFERS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "pp2-tp2-ep2-dp2"])
def test_biases_and_tables_are_the_same_in_every_layout(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    for router in ("sigmoid", "hash"):
        for name, size, setting in (("one", 1, ()), ("run", world, (parallel,))):
            train(ranks, tmp_path, tiny_corpus, size, f"{name}-{router}", MODEL, *ADAMW, *ROUTERS[router], *setting)
        alone, found = (buffers(tmp_path, f"{name}-{router}", 3) for name in ("one", "run"))
        assert len(alone) == 4
        assert alone.keys() == found.keys()
        assert all(torch.equal(found[name], buffer) for name, buffer in alone.items())
    biases = buffers(tmp_path, "one-sigmoid", 3)
    assert all(0.01 < bias.abs().max() <= 0.06 + 1e-6 for bias in biases.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "first", "second"), [("sigmoid", "pp2", "tp2"), ("rl_r", "tp2", "pp2-interleaved"), ("hash", "ep2", "dp2")]
)
def test_a_run_goes_on_in_another_layout_as_if_it_had_never_stopped(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, router: str, first: str, second: str
) -> None:
    settings = (MODEL, *ADAMW, *ROUTERS[router])
    before = train(ranks, tmp_path, tiny_corpus, LAYOUTS[first][0], "run", *settings, LAYOUTS[first][1], stop_after=2)
    after = train(ranks, tmp_path, tiny_corpus, LAYOUTS[second][0], "run", *settings, LAYOUTS[second][1])
    joined = Result(before.curve + after.curve, before.records + after.records, before.start, after.end)
    assert problems(joined, one(*ROUTERS[router])) == []


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_is_near_fp32(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, router: str) -> None:
    world, parallel = LAYOUTS["tp2"]
    exact = one(*ROUTERS[router])
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, *ROUTERS[router], parallel, "precision=bf16")
    for (loss, norm), (exact_loss, exact_norm) in zip(found.curve, exact.curve, strict=True):
        assert loss == pytest.approx(exact_loss, rel=2e-3)
        assert norm == pytest.approx(exact_norm, rel=5e-2)
