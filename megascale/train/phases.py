"""A run phase by phase. At a border the checkpoint of one phase is what the next begins with, in the same process or after a resume."""

from __future__ import annotations

from pathlib import Path

from megascale.checkpoint.folders import list_checkpoints, step_of
from megascale.config.phases import spans
from megascale.config.schema import Config
from megascale.data.open_data import OpenData
from megascale.observe.sinks import Sink
from megascale.parallel.mesh import Mesh
from megascale.train.build import build
from megascale.train.start import Start, frozen_by
from megascale.train.stopping import StopRequest
from megascale.train.trainer import Say, Trainer


def train_phases(
    config: Config,
    data: OpenData,
    mesh: Mesh,
    folder: Path,
    sink: Sink,
    lineage: int,
    stop: StopRequest,
    say: Say,
    start: Start | None = None,
) -> tuple[str, int]:
    """Train from the newest checkpoint, or another model's weights, on to the end of the last phase; the reason for exit.json, and the
    step reached.
    """
    world = mesh.world
    saved = [step_of(path) for path in list_checkpoints(folder / "checkpoints")] if world.rank == 0 else []
    newest = world.broadcast(max(saved, default=0))
    phases = spans(config)
    reason, step = "done", newest
    for number, span in enumerate(phases):
        if newest >= span.last and number < len(phases) - 1:
            continue
        before = phases[number - 1].config.model if number else start.model if start else None
        parts = build(span.config, data, mesh, say, before, frozen_by(start, span.config.model))
        trainer = Trainer(parts, world, folder, sink, lineage, say, span, start)
        reason, step = trainer.run(stop), trainer.progress.step
        if reason != "done":
            break
    return reason, step
