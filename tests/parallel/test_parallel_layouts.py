"""Every layout trains the run of one process: P=2, E=4, K=2 on up to 8 gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import ADAMW, SGD_LIKE, Result, problems, train
from ranks import RankPool

LAYOUTS = {
    "tp2": (2, "parallel.tp=2"),
    "ep2": (2, "parallel.ep=2"),
    "pp2": (2, "parallel.pp=2"),
    "pp2-tp2-dp2": (8, "parallel={pp: 2, tp: 2}"),
    "tp2-ep2-dp2": (4, "parallel={tp: 2, ep: 2}"),
    "tp2-ep4-dp2": (4, "parallel={tp: 2, ep: 4}"),
    "pp2-ep2-dp2": (4, "parallel={pp: 2, ep: 2}"),
    "tp4": (4, "parallel={tp: 4}"),
    "pp2-interleaved": (2, "parallel={pp: 2, schedule: interleaved, virtual_stages: 2}"),
    "pp2-tp2-ep2": (4, "parallel={pp: 2, tp: 2, ep: 2}"),
    "pp4-dp2": (8, "parallel={pp: 4}"),
}
FOUR_HEADS = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> dict[str, Result]:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    return {
        "adamw": train(ranks, folder, tiny_corpus, 1, "adamw", FOUR_HEADS, *ADAMW),
        "sgd": train(ranks, folder, tiny_corpus, 1, "sgd", FOUR_HEADS, *SGD_LIKE),
    }


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], layout: str, optimizer: str
) -> None:
    world, override = LAYOUTS[layout]
    settings = ADAMW if optimizer == "adamw" else SGD_LIKE
    found = train(ranks, tmp_path, tiny_corpus, world, layout, FOUR_HEADS, *settings, override, "parallel.zero_stage=0")
    assert problems(found, one[optimizer]) == []
