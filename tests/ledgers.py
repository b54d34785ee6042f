"""What a real run sends, to compare a dry run with: the ledger of a second step on gloo ranks."""

from __future__ import annotations

from typing import Any

import torch

from megascale.config.schema import Config
from megascale.parallel.ledger import Entry, Ledger
from megascale.train.batch_stream import step_batches
from runs import build_parts, one_process


def ledger_of_a_step(rank: int, size: int, settings: dict[str, Any]) -> list[Entry]:
    """A rank's ledger of the second step: in the first one the stages of a pipeline also get to know each other."""
    config = Config.model_validate(settings)
    parts = build_parts(config, one_process(rank, size))
    readers, engine = parts.mesh.along("dp"), parts.engine
    entries: list[Entry] = []
    for batch in step_batches(parts.data.train, config.batch, 1, 2, readers.index(rank), len(readers)):
        count = len(batch.micro_batches)
        with Ledger(parts.mesh) as ledger:
            parts.stages.gradients(batch.micro_batches, [1 / count] * count, torch.tensor(1e-3), engine, lambda *_: None)
            engine.gradient_norm()
            engine.step(1.0)
        entries = ledger.entries()
    return entries
