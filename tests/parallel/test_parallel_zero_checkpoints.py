"""Checkpoints of the DeepSpeed engine are everybody's: any engine reads any other's, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layouts import ADAMW, CUT_ALL, PLAIN, full_unless, train
from megascale.checkpoint.load import CheckpointReader
from megascale.config.schema import Config
from ranks import RankPool
from runs import ALL_AXES, Run, losses, one_process, tiny_config


def all_tensors(path: Path) -> dict[str, Tensor]:
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.names()}


def resave(rank: int, size: int, settings: dict[str, Any]) -> None:
    """Loads the newest checkpoint of a run and saves what was loaded beside it."""
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.trainer.checkpoints = run.folder / "again"
    run.save()


def continue_on_rank(rank: int, size: int, settings: dict[str, Any]) -> list[list[Any]]:
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.train()
    return losses(run.records)


def adopt(folder: Path, name: str, source: str) -> None:
    """A new run that starts with the checkpoints of another."""
    (folder / "runs" / name).mkdir()
    shutil.copytree(folder / "runs" / source / "checkpoints", folder / "runs" / name / "checkpoints")


READERS = {
    "plain-1": (1, PLAIN),
    "plain-pp2": (2, "parallel={zero_stage: 0, pp: 2}"),
    "zero1-dp2": (2, "parallel.zero_stage=1"),
    "zero2-dp3": (3, "parallel.zero_stage=2"),
    "zero1-tp2-ep2-dp2": (4, "parallel={zero_stage: 1, tp: 2, ep: 2}"),
    "zero2-pp2-tp2": (4, "parallel={zero_stage: 2, pp: 2, tp: 2}"),
    "zero3-dp2": (2, "parallel.zero_stage=3", CUT_ALL),
    "zero3-tp2-dp2": (4, "parallel={zero_stage: 3, tp: 2}", CUT_ALL),
}
STATE = (*ALL_AXES, "precision=bf16", "batch={sequences: 12, micro_batches: 1}", "schedule.steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, pytest.param(0, marks=pytest.mark.full)])
@pytest.mark.parametrize("writer", full_unless(["zero1-tp2-ep2-dp2"], ["plain-1", "zero1-tp2-ep2-dp2", "zero3-dp2"]))
def test_any_engine_reads_any_other_bit_for_bit(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, writer: str, steps: int
) -> None:
    """Step 0 has no optimizer state yet."""
    world, *overrides = READERS[writer]
    train(ranks, tmp_path, tiny_corpus, world, "writer", *STATE, *overrides, steps=2)
    step = f"step-{steps:08d}"
    written = all_tensors(tmp_path / "runs" / "writer" / "checkpoints" / step)
    kinds = {name.split("/")[0] for name in written}
    assert kinds == ({"model"} | {"adamw.exp_avg", "adamw.exp_avg_sq", "adamw.step"} if steps else {"model"})
    for name, (size, *layout) in READERS.items():
        adopt(tmp_path, name, "writer")
        if steps == 0:
            shutil.rmtree(tmp_path / "runs" / name / "checkpoints" / "step-00000002")
        settings = tiny_config(tmp_path, tiny_corpus, *STATE, *layout, f"run.name={name}").model_dump()
        ranks.run(resave, settings, world_size=size)
        found = all_tensors(tmp_path / "runs" / name / "again" / step)
        assert found.keys() == written.keys()
        assert [key for key, tensor in written.items() if not torch.equal(found[key], tensor)] == []


ENGINES = [(writer, reader) for writer in ("plain-1", "zero2-dp3") for reader in ("plain-1", "zero1-dp2", "zero3-dp2")]


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), full_unless([("plain-1", "zero3-dp2"), ("zero2-dp3", "plain-1")], ENGINES))
def test_a_run_goes_on_under_another_engine(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, writer: str, reader: str) -> None:
    """Loaded moments, steps and bf16 weights are used: the curve is that of the run that was never stopped."""
    common = (*STATE, *ADAMW, "schedule={warmup_steps: 0, shape: constant}")
    whole = train(ranks, tmp_path, tiny_corpus, 1, "whole", *common, PLAIN, steps=4).curve
    world, *overrides = READERS[writer]
    first = train(ranks, tmp_path, tiny_corpus, world, "written", *common, *overrides, steps=2).curve
    size, *layout = READERS[reader]
    adopt(tmp_path, "read", "written")
    config = tiny_config(tmp_path, tiny_corpus, *common, "schedule.steps=4", *layout, "run.name=read")
    (rest, *_) = ranks.run(continue_on_rank, config.model_dump(), world_size=size)
    for found, expected in zip([*first, *rest], whole, strict=True):
        assert found == pytest.approx(expected, rel=2e-3)  # bf16, other sums


@pytest.mark.slow
@pytest.mark.parametrize("layout", full_unless(["zero2-dp3", "zero3-dp2"], ["zero1-dp2", "zero2-dp3", "zero3-dp2"]))
def test_a_resumed_run_is_the_one_that_never_stopped(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, layout: str) -> None:
    world, *overrides = READERS[layout]
    whole = train(ranks, tmp_path, tiny_corpus, world, "whole", *STATE, *overrides)
    stopped = train(ranks, tmp_path, tiny_corpus, world, "stopped", *STATE, *overrides, stop_after=2)
    resumed = train(ranks, tmp_path, tiny_corpus, world, "stopped", *STATE, *overrides)
    assert [*stopped.curve, *resumed.curve] == whole.curve
    ends = [all_tensors(tmp_path / "runs" / name / "checkpoints" / "step-00000003") for name in ("whole", "stopped")]
    assert ends[0].keys() == ends[1].keys()
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []
