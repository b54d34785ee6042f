"""Every form of AltUp trains the run of one process in layouts, with P=2 and E=4. Pairs with other features: tests/compositions.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import ADAMW, full_unless, problems, train
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from ranks import RankPool
from runs import write_config

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
DEEP = "model={width: 16, layers: 16, heads: 2, kv_heads: 2, ffn_width: 32}"
WIDE = "model.altup={blocks: 2, form: wide, coefficients: token}"
GEMMA = "model.altup={blocks: 2, coefficients: token, read: predicted, select: same}"
SEQUENCE = "model.altup={form: sequence, stride: 3}"
CUT_ALL = 'engine.deepspeed.zero_optimization={"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}'
VALIDATION = "validation={every: 2, sequences: 3}"
CASES = {
    "wide, by token": ("tp2-ep2-dp2", (MODEL, WIDE, VALIDATION)),
    "wide, by token, in stages": ("pp2-tp2-dp2", (MODEL, WIDE, VALIDATION)),
    "wide, tied over stages": ("pp2-tp2-dp2", (MODEL, "model.altup={blocks: 2, form: wide}", "model.tie_embeddings=true")),
    "predicted, by token": ("pp2-tp2-dp2", (MODEL, GEMMA)),
    "sequence": ("pp2-ep2-dp2", (MODEL, SEQUENCE, VALIDATION)),
    "sequence with capacity": ("ep2", (MODEL, SEQUENCE, "model.experts.capacity_factor=1.0")),
    "sequence, recomputed, interleaved": ("pp2-interleaved", (MODEL, SEQUENCE, "parallel.recompute=layer")),
    "rebuilt states": ("tp2-ep2-dp2", (DEEP, "model.altup={blocks: 4, coefficients: token}", "parallel.recompute=layer")),
    "rebuilt states in stages": ("pp2-tp2-dp2", (DEEP, "model.altup={blocks: 8}", "parallel.recompute=layer")),
    "ZeRO 1, wide": ("zero1", (MODEL, WIDE)),
    "ZeRO 1, sequence": ("zero1-ep2", (MODEL, SEQUENCE)),
    "ZeRO 1, rebuilt states": ("zero1-ep2", (DEEP, "model.altup={blocks: 4}", "parallel.recompute=layer")),
    "ZeRO 3, predicted, by token": ("zero3", (MODEL, GEMMA, CUT_ALL)),
    "ZeRO 3, predicted, recomputed": ("zero3", (MODEL, GEMMA, CUT_ALL, "parallel.recompute=layer")),
    "ZeRO 3, sequence": ("zero3", (MODEL, SEQUENCE, CUT_ALL)),
}
QUICK = ("wide, by token, in stages", "predicted, by token", "sequence", "ZeRO 3, sequence")
LAYOUTS = {
    "ep2": (2, "parallel={ep: 2, zero_stage: 0}"),
    "tp2-ep2-dp2": (4, "parallel={tp: 2, ep: 2, zero_stage: 0}"),
    "pp2-tp2-dp2": (8, "parallel={pp: 2, tp: 2, zero_stage: 0}"),
    "pp2-ep2-dp2": (4, "parallel={pp: 2, ep: 2, zero_stage: 0}"),
    "pp2-interleaved": (2, "parallel={pp: 2, schedule: interleaved, virtual_stages: 2, zero_stage: 0}"),
    "zero1": (2, "parallel={zero_stage: 1}"),
    "zero3": (2, "parallel={zero_stage: 3}"),
    "zero1-ep2": (2, "parallel={ep: 2, zero_stage: 1}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", full_unless(QUICK, CASES))
def test_a_layout_trains_the_run_of_one_process(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, name: str) -> None:
    layout, settings = CASES[name]
    world, parallel = LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, "run", *ADAMW, parallel, *settings)
    alone = [setting for setting in settings if not setting.startswith("engine.")]
    one = train(ranks, tmp_path, tiny_corpus, 1, "one", *ADAMW, *alone)
    assert problems(found, one) == []


def test_tensor_parallel_ranks_cannot_share_kept_tokens(tmp_path: Path, tiny_corpus: Path) -> None:
    loaded = load_config(write_config(tmp_path, tiny_corpus), ["model.layers=4", SEQUENCE, "parallel.tp=2"])
    with pytest.raises(InputError, match="tp 2 would cut the sequence, whose kept tokens are not shared evenly"):
        check(loaded, 2)
