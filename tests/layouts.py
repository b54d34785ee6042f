"""Trains one tiny run in any layout and compares it with one process: the ground of the layout tests.

The rule: losses and gradient norms within 1e-5 (fp32), each weight within a thousandth of the way that it went.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.load import CheckpointReader
from megascale.config.schema import Config
from megascale.train.build import Parts
from ranks import RankPool
from runs import ALL_AXES, Run, losses, one_process, tiny_config

ADAMW = ("optimizer={lr: 0.003, eps: 1e-5}",)
# With an epsilon far above the moments and no memory, AdamW's update is the gradient times lr / eps.
SGD_LIKE = ("optimizer={lr: 100, eps: 1000, betas: [0, 0], weight_decay: 0, clip: null}",)
SPOILED = "layers.1.attention.v.weight"


@dataclass(frozen=True)
class Result:
    """What a run leaves: loss and gradient norm of every step, and the saved weights by name, at the start and at the end."""

    curve: list[list[float]]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


def spoil(parts: Parts) -> None:
    """What a wrong reduction would do: one tensor's gradient 1 % too large on one rank that holds it."""
    parameter = parts.engine.parameters.get(SPOILED)
    if parameter is not None and max(parts.engine.placements[SPOILED].holders) == parts.mesh.world.rank:
        parameter.register_hook(lambda gradient: gradient * 1.01)


def train_on_rank(rank: int, size: int, settings: dict[str, Any], spoiled: bool) -> list[list[float]]:
    run = Run(Config.model_validate(settings), one_process(rank, size), spoil if spoiled else None)
    run.save()
    assert run.train() == "done"
    return losses(run.records)


def train(
    ranks: RankPool, folder: Path, corpus: Path, world: int, name: str, *overrides: str, spoiled: bool = False, steps: int = 3
) -> Result:
    """Trains in a layout; all ranks must report the same."""
    settings = (
        *ALL_AXES,
        "batch={sequences: 8, micro_batches: 2}",
        "schedule={warmup_steps: 0, shape: constant}",
        *overrides,
        f"schedule.steps={steps}",
        f"run.name={name}",
    )
    config = tiny_config(folder, corpus, *settings)
    curves = ranks.run(train_on_rank, config.model_dump(), spoiled, world_size=world)
    assert all(curve == curves[0] for curve in curves)
    checkpoints = folder / "runs" / name / "checkpoints"
    return Result(curves[0], saved_weights(checkpoints / "step-00000000"), saved_weights(checkpoints / f"step-{steps:08d}"))


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.names() if name.startswith("model/")}


def problems(found: Result, reference: Result, tolerance: float = 1e-5, way: float = 1e-3) -> list[str]:
    """What breaks the rule: step numbers and tensor names."""
    pairs = list(zip(found.curve, reference.curve, strict=True))
    wrong = [f"step {i}: {a} != {b}" for i, (a, b) in enumerate(pairs, 1) if a != pytest.approx(b, rel=tolerance)]
    assert found.end.keys() == reference.end.keys()
    for name, weight in reference.end.items():
        if not torch.equal(found.start[name], reference.start[name]):
            wrong.append(f"start of {name}")
        moved = (weight - reference.start[name]).norm()
        if (found.end[name] - weight).norm() > way * moved:
            wrong.append(name)
    return wrong
