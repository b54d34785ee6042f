"""Zero-bubble schedules train the run of one process, and compute what 1F1B computes: P=2, E=4, K=2."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import ADAMW, Result, problems, train
from ranks import RankPool

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
BATCH = "batch={sequences: 16, micro_batches: 4}"
LAYOUTS = {
    "zero_bubble": (2, "schedule: zero_bubble"),
    "zero_bubble, two stages a rank": (2, "schedule: zero_bubble, virtual_stages: 2"),
    "zbv": (2, "schedule: zbv"),
    "dualpipev": (2, "schedule: dualpipev"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_schedule_trains_the_run_of_one_process(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    one = train(ranks, tmp_path, tiny_corpus, 1, "one", MODEL, *ADAMW, BATCH)
    found = train(
        ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, BATCH, f"parallel={{pp: 2, zero_stage: 0, {parallel}}}"
    )
    assert problems(found, one) == []
