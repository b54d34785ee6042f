"""Streams in layouts: one after the other, with networks that make their prefixes, and the first layer's shared work, as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import ADAMW, SGD_LIKE, References, problems, train
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from ranks import RankPool
from runs import write_config

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
NETWORK = "model.streams.reparameterise=6"
RL_R = "model.experts.router=rl_r"
LAYOUTS = {
    "tp2-ep2-dp2": (4, "tp: 2, ep: 2, zero_stage: 0"),
    "pp2-ep2-dp2": (4, "pp: 2, ep: 2, zero_stage: 0"),
    "pp2-interleaved": (2, "pp: 2, schedule: interleaved, virtual_stages: 2, zero_stage: 0"),
    "zero1-dp2": (2, "zero_stage: 1"),
    "zero2-tp2": (2, "zero_stage: 2, tp: 2"),
    "zero3-dp2": (2, "zero_stage: 3"),
}
"""Name -> ranks, settings of parallel."""


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> References:
    return References(ranks, tmp_path_factory.mktemp("one"), tiny_corpus, MODEL)


def parallel(settings: str) -> str:
    return "parallel={" + settings + "}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams_one_after_the_other_train_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, layout: str
) -> None:
    world, settings = LAYOUTS[layout]
    optimizer = SGD_LIKE if layout.startswith(("tp", "pp2-ep2")) else ADAMW
    found = train(ranks, tmp_path, tiny_corpus, world, layout, MODEL, *optimizer, parallel(f"{settings}, recompute: stream"))
    assert problems(found, one(*optimizer)) == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(RL_R,), ("model.experts.capacity_factor=0.9",), (NETWORK,)], ids=lambda x: x[0])
def test_it_holds_for_routers_that_draw_or_drop_and_for_networks(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, settings: tuple[str, ...]
) -> None:
    layout = parallel("pp: 2, tp: 2, ep: 2, zero_stage: 0, recompute: stream")
    found = train(ranks, tmp_path, tiny_corpus, 4, "run", MODEL, *ADAMW, *settings, layout)
    assert problems(found, one(*ADAMW, *settings)) == []


@pytest.mark.full
@pytest.mark.slow
def test_it_holds_for_compiled_layers(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References) -> None:
    layout = parallel("tp: 2, zero_stage: 0, recompute: stream")
    found = train(ranks, tmp_path, tiny_corpus, 2, "run", MODEL, *ADAMW, layout, "compile=on")
    assert problems(found, one(*ADAMW)) == []


@pytest.mark.slow
def test_in_bf16_it_is_as_near_to_fp32(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References) -> None:
    """Weights after three steps, distance from the fp32 run over the way they went: no further than what keeps everything."""
    exact = one(*ADAMW)
    distances = []
    for mode in ("none", "stream"):
        layout = parallel(f"zero_stage: 0, recompute: {mode}")
        found = train(ranks, tmp_path, tiny_corpus, 2, mode, MODEL, *ADAMW, layout, "precision=bf16")
        moved = {name: (end - exact.start[name]).norm() for name, end in exact.end.items() if ".residual." not in name}
        distances.append(max(float((found.end[name] - exact.end[name]).norm() / way) for name, way in moved.items()))
    assert distances[1] < 1.5 * distances[0] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp: 4", "tp: 2, ep: 2", "pp: 2"])
def test_networks_that_make_prefixes_train_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, layout: str
) -> None:
    """With tp 4 two ranks hold each of the two key/value heads."""
    found = train(ranks, tmp_path, tiny_corpus, 4, "run", MODEL, *SGD_LIKE, NETWORK, parallel(f"{layout}, zero_stage: 0"))
    assert problems(found, one(*SGD_LIKE, NETWORK)) == []


@pytest.mark.slow
def test_a_quiet_start_is_that_of_one_process(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References) -> None:
    quiet = ("model.streams.prefix_start=quiet", NETWORK)
    found = train(ranks, tmp_path, tiny_corpus, 4, "run", MODEL, *ADAMW, *quiet, parallel("pp: 2, tp: 2, zero_stage: 0"))
    assert problems(found, one(*ADAMW, *quiet)) == []


def test_one_stream_cannot_be_recomputed_by_itself(tmp_path: Path, tiny_corpus: Path) -> None:
    with pytest.raises(InputError, match="there is one stream; set parallel.recompute=layer"):
        check(load_config(write_config(tmp_path, tiny_corpus), ["parallel.recompute=stream"]))
