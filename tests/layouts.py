"""Trains one tiny run in any layout and compares it with one process: the ground of the layout tests.

The rule: losses and gradient norms within 1e-5 (fp32), each weight within a thousandth of the way that it went, all other reproducible
metrics within 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.load import CheckpointReader
from megascale.config.schema import Config
from megascale.observe.metrics import Record
from megascale.train.build import Parts
from ranks import RankPool
from runs import ALL_AXES, Run, losses, one_process, tiny_config

ADAMW = ("optimizer={lr: 0.003, eps: 1e-5}",)
# With an epsilon far above the moments and no memory, AdamW's update is the gradient times lr / eps.
SGD_LIKE = ("optimizer={lr: 100, eps: 1000, betas: [0, 0], weight_decay: 0, clip: null}",)
# Small tensors, and those soon used again, stay whole on every rank by default: here all of them are cut, released at once, and gathered
# again a few at a time, ahead of their use.
CUT_ALL_SETTINGS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2000,
    "reduce_bucket_size": 4096,
}
CUT_ALL = f"engine.deepspeed.zero_optimization={json.dumps(CUT_ALL_SETTINGS)}"
PLAIN = "parallel.zero_stage=0"
SPOILED = "layers.1.attention.o.weight"


@dataclass(frozen=True)
class Result:
    """What a run leaves: loss and gradient norm of every step, its records, and the saved weights by name, at the start and at the end."""

    curve: list[list[float]]
    records: list[Record]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


def spoil(parts: Parts) -> None:
    """What a wrong reduction would do: one tensor's gradient 1 % too large on one rank that holds it."""
    parameter = parts.engine.parameters.get(SPOILED)
    if parameter is not None and max(parts.engine.placements[SPOILED].holders) == parts.mesh.world.rank:
        parameter.register_hook(lambda gradient: gradient * 1.01)


def train_on_rank(rank: int, size: int, settings: dict[str, Any], spoiled: bool, stop_after: int) -> list[Record]:
    """Goes on where the run's folder stands; a new run saves its start."""
    run = Run(Config.model_validate(settings), one_process(rank, size), spoil if spoiled else None)
    if run.trainer.progress.step == 0:
        run.save()
    run.stop_after = stop_after
    assert run.train() == ("stop" if stop_after else "done")
    return run.records


def train(
    ranks: RankPool,
    folder: Path,
    corpus: Path,
    world: int,
    name: str,
    *overrides: str,
    spoiled: bool = False,
    steps: int = 3,
    stop_after: int = 0,
) -> Result:
    """Trains in a layout, to the end or (stop_after > 0) to a stop; all ranks must report the same."""
    config = layout_config(folder, corpus, name, *overrides, f"schedule.steps={steps}")
    timeout = 120 if config.compile == "off" else 600  # cores that all ranks share compile for all of them
    records, *others = ranks.run(train_on_rank, config.model_dump(), spoiled, stop_after, world_size=world, timeout=timeout)
    assert all(reproducible(other) == reproducible(records) for other in others)
    checkpoints = folder / "runs" / name / "checkpoints"
    start, end = (saved(checkpoints / f"step-{step:08d}", "model/") for step in (0, stop_after or steps))
    return Result(losses(records), records, start, end)


class References:
    """Runs of one process with some settings in common, each trained when first asked for."""

    def __init__(self, ranks: RankPool, folder: Path, corpus: Path, *common: str):
        self.ranks, self.folder, self.corpus, self.common = ranks, folder, corpus, common
        self.results: dict[tuple[str, ...], Result] = {}

    def __call__(self, *settings: str, steps: int = 3) -> Result:
        """The run with these settings besides."""
        key = (*settings, str(steps))
        if key not in self.results:
            name = f"one-{len(self.results)}"
            self.results[key] = train(self.ranks, self.folder, self.corpus, 1, name, *self.common, *settings, steps=steps)
        return self.results[key]


def load_and_save(rank: int, size: int, settings: dict[str, Any], folder: str) -> int:
    """Resumes the run and saves what it has into another folder; the step it stands at."""
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.trainer.checkpoints = Path(folder)
    run.save()
    return run.trainer.progress.step


def change(
    ranks: RankPool,
    folder: Path,
    corpus: Path,
    first: tuple[int, tuple[str, ...]],
    second: tuple[int, tuple[str, ...]],
    name: str = "run",
) -> tuple[Result, list[str]]:
    """Five steps, of which the last three in another layout, and the tensors whose bits change when that one loads and saves them again.

    Args:
        first: ranks, and the overrides of the layout and all else.
        second: likewise.
    """
    before = train(ranks, folder, corpus, first[0], name, *first[1], steps=5, stop_after=2)
    config = layout_config(folder, corpus, name, *second[1], "schedule.steps=5")
    again = folder / f"again-{name}"
    assert set(ranks.run(load_and_save, config.model_dump(), str(again), world_size=second[0])) == {2}
    old, new = (saved(place / "step-00000002") for place in (folder / "runs" / name / "checkpoints", again))
    assert {tensor.split("/")[0] for tensor in old} >= {"model", "adamw.exp_avg", "adamw.exp_avg_sq", "adamw.step"}
    other = sorted(old.keys() ^ new.keys()) + [key for key in old.keys() & new.keys() if not torch.equal(old[key], new[key])]
    after = train(ranks, folder, corpus, second[0], name, *second[1], steps=5)
    return Result(before.curve + after.curve, before.records + after.records, before.start, after.end), other


def layout_config(folder: Path, corpus: Path, name: str, *overrides: str) -> Config:
    # a whole model section replaces what is set below it: sizes come before the axes
    sizes = [override for override in overrides if override.startswith("model={")]
    overrides = tuple(override for override in overrides if override not in sizes)
    settings = (
        *sizes,
        *ALL_AXES,
        "batch={sequences: 8, micro_batches: 2}",
        "schedule={warmup_steps: 0, shape: constant}",
        "checkpoint.keep_last=9",
        *overrides,
        f"run.name={name}",
    )
    config = tiny_config(folder, corpus, *settings)
    model = config.model
    altup = 2 if model.altup.form == "sequence" else model.altup.blocks
    assert min(model.streams.count, model.experts.count, altup) > 1, "a layout test of a plain model proves little"
    return config


def full_unless(kept: Iterable[Any], names: Iterable[Any]) -> list[Any]:
    """Test parameters (tuples: of several arguments) of which all but some run with --full only."""
    kept = set(kept)
    values = {name: name if isinstance(name, tuple) else (name,) for name in names}
    return [pytest.param(*value, marks=() if name in kept else pytest.mark.full) for name, value in values.items()]


def reproducible(records: list[Record]) -> list[Record]:
    """Without times, rates and memory."""
    return [{k: v for k, v in record.items() if not k.startswith(("perf/", "memory/"))} for record in records]


def saved(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.names() if name.startswith(prefix)}


def problems(found: Result, reference: Result, tolerance: float = 1e-5, way: float = 1e-3) -> list[str]:
    """What breaks the rule: step numbers, metrics and tensor names."""
    pairs = list(zip(found.curve, reference.curve, strict=True))
    wrong = [f"step {i}: {a} != {b}" for i, (a, b) in enumerate(pairs, 1) if a != pytest.approx(b, rel=tolerance)]
    for ours, theirs in zip(reproducible(found.records), reproducible(reference.records), strict=True):
        assert ours.keys() == theirs.keys()
        wrong += [f"step {ours['step']}: {k}" for k in ours if ours[k] != pytest.approx(theirs[k], rel=100 * tolerance, abs=1e-6)]
    assert found.end.keys() == reference.end.keys()
    for name, weight in reference.end.items():
        if not torch.equal(found.start[name], reference.start[name]):
            wrong.append(f"start of {name}")
        moved = (weight - reference.start[name]).norm()
        if (found.end[name] - weight).norm() > way * moved:
            wrong.append(name)
    return wrong
