"""The DeepSpeed engine: ZeRO 1, 2 and 3 train the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import ADAMW, CUT_ALL, PLAIN, SGD_LIKE, SPOILED, Result, full_unless, problems, train
from megascale.config.schema import Config
from ranks import RankPool
from runs import ALL_AXES, Run, losses, one_process, tiny_config

THREE_RANKS = "batch={sequences: 6, micro_batches: 2}"
SMALL_BUCKETS = "engine.deepspeed.zero_optimization.reduce_bucket_size=4096"
"""Many of them are full before the last gradient is final."""
TIED = "model.tie_embeddings=true"
LAYOUTS = {
    "zero1-dp2": (2, "parallel.zero_stage=1"),
    "zero2-dp2": (2, "parallel.zero_stage=2", SMALL_BUCKETS),
    "zero3-dp2": (2, "parallel.zero_stage=3", CUT_ALL),
    "zero3-dp2-small-whole": (2, "parallel.zero_stage=3"),
    "zero3-dp2-recomputed": (2, "parallel={zero_stage: 3, recompute: layer}", CUT_ALL),
    "zero3-dp2-streams-apart": (2, "parallel={zero_stage: 3, recompute: stream}", CUT_ALL),
    "zero3-dp4": (4, "parallel.zero_stage=3", CUT_ALL),
    "zero1-one-rank": (1, "parallel.zero_stage=1"),
    "zero3-one-rank": (1, "parallel.zero_stage=3", CUT_ALL),
    "zero1-tp4": (4, "parallel={zero_stage: 1, tp: 4}"),
    "zero1-tp2-dp2": (4, "parallel={zero_stage: 1, tp: 2}"),
    "zero2-tp2-ep2-dp2": (4, "parallel={zero_stage: 2, tp: 2, ep: 2}"),
    "zero1-tp2-ep4-dp2": (4, "parallel={zero_stage: 1, tp: 2, ep: 4}", SMALL_BUCKETS),
    "zero3-tp2-dp2": (4, "parallel={zero_stage: 3, tp: 2}", CUT_ALL),
    "zero1-pp2-dp2": (4, "parallel={zero_stage: 1, pp: 2}"),
    "zero2-pp2-ep2-dp2": (4, "parallel={zero_stage: 2, pp: 2, ep: 2}"),
    "zero1-interleaved": (4, "parallel={zero_stage: 1, pp: 2, schedule: interleaved, virtual_stages: 2}"),
}
QUICK = (
    "zero2-dp2",
    "zero3-dp2",
    "zero3-dp2-recomputed",
    "zero3-dp2-streams-apart",
    "zero3-dp4",
    "zero1-tp4",
    "zero1-tp2-ep4-dp2",
    "zero3-tp2-dp2",
    "zero2-pp2-ep2-dp2",
    "zero1-interleaved",
)
TIED_LAYOUTS = {
    "zero1-pp2-tp2": (4, "parallel={zero_stage: 1, pp: 2, tp: 2}"),
    "zero2-pp2-dp2": (4, "parallel={zero_stage: 2, pp: 2}"),
    "zero3-dp2": (2, "parallel.zero_stage=3", CUT_ALL),
}
FOUR_LAYERS = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> dict[str, Result]:
    """The runs of one process with the plain engine."""
    settings = {"adamw": ADAMW, "sgd": SGD_LIKE, "tied": (*ADAMW, TIED), "three": (*ADAMW, THREE_RANKS)}
    folder = tmp_path_factory.mktemp("one")
    return {name: train(ranks, folder, tiny_corpus, 1, name, FOUR_LAYERS, *some, PLAIN) for name, some in settings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", full_unless(QUICK, LAYOUTS))
def test_a_layout_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], layout: str, optimizer: str
) -> None:
    world, *overrides = LAYOUTS[layout]
    settings = ADAMW if optimizer == "adamw" else SGD_LIKE
    found = train(ranks, tmp_path, tiny_corpus, world, layout, FOUR_LAYERS, *settings, *overrides)
    assert problems(found, one[optimizer]) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", TIED_LAYOUTS)
def test_tied_embeddings_get_the_gradients_of_both_ends(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], layout: str
) -> None:
    world, *overrides = TIED_LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, layout, FOUR_LAYERS, *ADAMW, TIED, *overrides)
    assert problems(found, one["tied"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_sums_over_three_ranks_too(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], stage: int
) -> None:
    """Three divides neither the parameters evenly nor a float exactly."""
    overrides = (THREE_RANKS, f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
    found = train(ranks, tmp_path, tiny_corpus, 3, "three", FOUR_LAYERS, *ADAMW, *overrides)
    assert problems(found, one["three"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_percent_on_one_gradient_is_found(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], stage: int
) -> None:
    overrides = (f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
    found = train(ranks, tmp_path, tiny_corpus, 2, "spoiled", FOUR_LAYERS, *ADAMW, *overrides, spoiled=True)
    wrong = problems(found, one["adamw"])
    assert any(line.startswith("step") for line in wrong)
    assert f"model/{SPOILED}" in wrong


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.full), 4])
def test_bf16_trains_as_with_the_plain_engine(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], world: int
) -> None:
    """fp32 gradients and masters around bf16 weights, and fp32 islands, with the same tolerance as in fp32; validation runs in between."""
    common = (FOUR_LAYERS, *ADAMW, "precision=bf16", "validation={every: 1, sequences: 8}")
    plain = train(ranks, tmp_path, tiny_corpus, world, "plain", *common, PLAIN)
    for stage in (1, 2, 3):
        overrides = (f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
        found = train(ranks, tmp_path, tiny_corpus, world, f"zero{stage}", *common, *overrides)
        assert problems(found, plain) == []
        # masters start from the exact weights, not from the rounded ones
        assert all(torch.equal(weight, one["adamw"].start[name]) for name, weight in found.start.items())


def validated(rank: int, size: int, settings: dict[str, Any]) -> list[list[Any]]:
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.train()
    names = sorted(name for name in run.records[-1] if name.startswith("val/"))
    assert names
    return losses(run.records, *names)


def test_validation_sees_the_whole_weights(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    """Also under ZeRO 3, between the steps whose module order it has noted."""
    common = (*ALL_AXES, *ADAMW, "validation={every: 1, sequences: 8}", "schedule.steps=4")
    configs = [
        tiny_config(tmp_path, tiny_corpus, *common, *engine, f"run.name=run-{i}").model_dump()
        for i, engine in enumerate([(PLAIN,), ("parallel.zero_stage=3", CUT_ALL)])
    ]
    plain, zero = (ranks.run(validated, config, world_size=2)[0] for config in configs)
    for found, expected in zip(zero, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def parameter_dtypes(rank: int, size: int, settings: dict[str, Any]) -> dict[str, str]:
    engine = Run(Config.model_validate(settings), one_process(rank, size)).trainer.engine
    return {name: str(parameter.dtype) for name, parameter in engine.parameters.items()}


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_leaves_islands_in_fp32(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: int) -> None:
    config = tiny_config(tmp_path, tiny_corpus, *ALL_AXES, "precision=bf16", f"parallel.zero_stage={stage}")
    (dtypes, _) = ranks.run(parameter_dtypes, config.model_dump(), world_size=2)
    wide = {name for name, dtype in dtypes.items() if dtype == "torch.float32"}
    assert {dtype for name, dtype in dtypes.items() if name not in wide} == {"torch.bfloat16"}
    kinds = ("norm.weight", "router.weight", "residual.predict", "residual.correct")
    assert all(any(name.endswith(kind) for name in wide) for kind in kinds)
    assert all(name.endswith(kinds) for name in wide)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_frozen_trunk_keeps_its_exact_weights(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: int) -> None:
    """Here every trained parameter is bf16, so that no fp32 one comes first."""
    frozen = 'optimizer={lr: 0.01, groups: [{pattern: "*prefix_*"}, {pattern: "*", frozen: true}]}'
    common = (frozen, "precision=bf16")
    plain = train(ranks, tmp_path, tiny_corpus, 2, "plain", *common, PLAIN)
    overrides = (f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
    found = train(ranks, tmp_path, tiny_corpus, 2, "zero", *common, *overrides)
    for name, weight in found.end.items():
        assert torch.equal(weight, found.start[name]) == ("prefix_" not in name)
    assert problems(found, plain) == []
