"""Loss and bits per byte on held-out documents."""

from __future__ import annotations

import math

import numpy as np
import torch

from megascale.config.schema import Config
from megascale.data.batches import SequenceSet
from megascale.data.open_data import OpenData
from megascale.model.loss import IGNORED
from megascale.parallel.mesh import Mesh
from megascale.parallel.pipeline import Stages
from megascale.train.altup_health import altup_health

BATCH = 16
"""Sequences of one forward pass. Rows are independent, so it does not change the result."""


def held_out_loss(
    stages: Stages, sequences: SequenceSet, count: int, token_bytes: np.ndarray | None, mesh: Mesh
) -> dict[str, float]:
    """loss (nats per token), bits_per_byte where the tokenizer is known, tokens, of the first `count` sequences, shared by the ranks.

    All ranks run the same number of batches, because those of expert-parallel ranks exchange tokens; who has no sequences left repeats the
    first one and does not count it.
    """
    count = min(count, len(sequences))
    sums = torch.zeros(3, dtype=torch.float64)
    readers = mesh.along("dp")
    counts_here = stages.is_last and not any(mesh.place[axis] for axis in ("stream", "cp", "tp"))
    for first in range(0, count, len(readers) * BATCH):
        start = first + readers.index(mesh.world.rank) * BATCH
        share = range(start, min(start + BATCH, count))
        batch = sequences.sequences(share if share else range(1))
        token_losses = stages.evaluate(batch)
        if share and counts_here:
            assert token_losses is not None
            labels = batch.labels[batch.labels != IGNORED]
            text = int(token_bytes[labels.numpy()].sum()) if token_bytes is not None else 0
            sums += torch.tensor([float(token_losses.double().sum()), labels.numel(), text], dtype=torch.float64)
    nats, tokens, text = mesh.world.sum(sums).tolist()
    result = {"loss": nats / tokens, "tokens": tokens}
    if text:
        result["bits_per_byte"] = nats / math.log(2) / text
    return result


def validate(stages: Stages, data: OpenData, config: Config, mesh: Mesh) -> dict[str, float]:
    """The val/* metrics of all sources and, with K > 1, AltUp's."""
    metrics: dict[str, float] = {}
    stages.train(False)
    for name, sequences in data.validation.items():
        result = held_out_loss(stages, sequences, config.validation.sequences, data.token_bytes, mesh)
        metrics |= {f"val/{name}/{key}": value for key, value in result.items() if key != "tokens"}
    if (config.model.altup.blocks > 1 or config.model.altup.form == "sequence") and data.validation:
        metrics |= altup_health(stages, next(iter(data.validation.values())), config.model, mesh)
    stages.train(True)
    return metrics
