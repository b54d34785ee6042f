"""Starting from another model in layouts: every rank reads its own rectangles, and the run is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import Result, problems, saved, train_on_rank
from megascale.checkpoint.layout import volume
from megascale.config.errors import InputError
from megascale.config.schema import Config
from ranks import RankPool
from runs import Run, losses, one_process
from starts import BLOCKS, EXPERTS, FAMILIES, STREAMS, save_foreign, started

LAYOUTS = {
    "tp2-dp2": (4, "parallel={tp: 2, zero_stage: 0}"),
    "tp2-dp2-zero1": (4, "parallel={tp: 2, zero_stage: 1}"),
    "pp2": (2, "parallel={pp: 2, zero_stage: 0}"),
    "pp2-zero1": (2, "parallel={pp: 2, zero_stage: 1}"),
    "dp2-zero2": (2, "parallel={zero_stage: 2}"),
    "dp2-zero3": (2, "parallel={zero_stage: 3}"),
    "dp2-zero3-recomputed": (2, "parallel={zero_stage: 3, recompute: layer}"),
}
BATCH = "batch={sequences: 8, micro_batches: 2}"
KEEP = "checkpoint.keep_last=9"


def run(ranks: RankPool, folder: Path, corpus: Path, source: Path, world: int, name: str, family: str, *overrides: str) -> Result:
    """As `layouts.train`, from another model."""
    config = started(folder, corpus, source, BATCH, KEEP, *overrides, f"run.name={name}", family=family)
    records, *_ = ranks.run(train_on_rank, config.model_dump(), False, 0, world_size=world)
    checkpoints = folder / "runs" / name / "checkpoints"
    start, end = (saved(checkpoints / f"step-{step:08d}", "model/") for step in (0, 3))
    return Result(losses(records), records, start, end)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["false", "true"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, family: str, freeze: str
) -> None:
    source = tmp_path / "hf"
    save_foreign(source, tiny_corpus, family)
    settings = (STREAMS, f"start.freeze={freeze}")
    alone = run(ranks, tmp_path, tiny_corpus, source, 1, "alone", family, *settings)
    for layout, (world, parallel) in LAYOUTS.items():
        if family != "Qwen2" and layout not in ("tp2-dp2-zero1", "pp2"):
            continue
        found = run(ranks, tmp_path, tiny_corpus, source, world, layout, family, *settings, parallel)
        assert problems(found, alone) == [], layout
        moved = {name for name in found.end if not torch.equal(found.start[name], found.end[name])}
        new = {name for name in found.end if "prefix" in name or "aggregator" in name}
        assert moved == (new if freeze == "true" else set(found.end)), layout


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2-dp2-zero1", "dp2-zero3", "tp2-ep2-dp2"])
def test_experts_and_blocks_start_alike_in_every_layout(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, layout: str) -> None:
    """Copies of a dense feed-forward, on the ranks that hold those experts."""
    world, parallel = {**LAYOUTS, "tp2-ep2-dp2": (4, "parallel={tp: 2, ep: 2, zero_stage: 0}")}[layout]
    source = tmp_path / "hf"
    save_foreign(source, tiny_corpus)
    settings = (STREAMS, EXPERTS, BLOCKS, "model.experts.shared=1")
    alone = run(ranks, tmp_path, tiny_corpus, source, 1, "alone", "Qwen2", *settings)
    found = run(ranks, tmp_path, tiny_corpus, source, world, layout, "Qwen2", *settings, parallel)
    assert problems(found, alone) == []


def elements_read(rank: int, size: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Elements that this rank has read of the other model, and elements it holds of what is there."""
    from megascale.train import start

    read = 0
    original = start.InheritedTensors.read

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        nonlocal read
        tensor = original(self, *arguments)
        read += volume(tuple(tensor.shape))
        return tensor

    start.InheritedTensors.read = counted
    try:
        parameters = Run(Config.model_validate(settings), one_process(rank, size)).trainer.engine.parameters
    finally:
        start.InheritedTensors.read = original
    return read, sum(p.numel() for name, p in parameters.items() if "prefix" not in name and "aggregator" not in name)


@pytest.mark.slow
def test_a_rank_reads_what_it_holds(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    save_foreign(tmp_path / "hf", tiny_corpus)
    config = started(tmp_path, tiny_corpus, tmp_path / "hf", STREAMS, BATCH, "parallel={tp: 2, pp: 2, zero_stage: 0}")
    for read, held in ranks.run(elements_read, config.model_dump(), world_size=4):
        assert read == held


def idle(rank: int, size: int, settings: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        Run(Config.model_validate(settings), one_process(rank, size))
    return str(caught.value)


FROZEN = {
    "first": '[{pattern: "layers.0.*", frozen: true}, {pattern: "embedding.*", frozen: true}]',
    "last": '[{pattern: "layers.1.*", frozen: true}, {pattern: "norm.*", frozen: true}, {pattern: "head.*", frozen: true}]',
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", FROZEN)
def test_a_pipeline_stage_may_train_nothing_but_not_under_deepspeed(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: str
) -> None:
    source, groups = tmp_path / "hf", f"optimizer.groups={FROZEN[stage]}"
    save_foreign(source, tiny_corpus)
    alone = run(ranks, tmp_path, tiny_corpus, source, 1, "alone", "Qwen2", groups)
    found = run(ranks, tmp_path, tiny_corpus, source, 2, "pp2", "Qwen2", groups, LAYOUTS["pp2"][1])
    assert problems(found, alone) == []
    config = started(tmp_path, tiny_corpus, source, BATCH, groups, LAYOUTS["pp2-zero1"][1], "run.name=zero")
    messages = ranks.run(idle, config.model_dump(), world_size=2)
    number = int(stage == "last")
    assert all(f"pipeline rank {number} (layers {number}) are frozen" in message for message in messages)


def missing_on_one(rank: int, size: int, settings: dict[str, Any], folder: str) -> str:
    """Rank 1 sees another model at the path than rank 0 does."""
    if rank == 1:
        (Path(folder) / "other").mkdir()
        settings["start"]["model"] = f"{folder}/other"
    with pytest.raises(InputError) as caught:
        Run(Config.model_validate(settings), one_process(rank, size))
    return str(caught.value)


@pytest.mark.slow
def test_all_ranks_learn_that_one_cannot_read_the_model(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    save_foreign(tmp_path / "hf", tiny_corpus)
    config = started(tmp_path, tiny_corpus, tmp_path / "hf", STREAMS, BATCH, "parallel={zero_stage: 0}")
    messages = ranks.run(missing_on_one, config.model_dump(), str(tmp_path), world_size=2)
    assert all("neither config.yaml nor config.json" in message for message in messages)
