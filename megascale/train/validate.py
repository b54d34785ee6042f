"""Loss and bits per byte on held-out documents."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megascale.config.schema import Config
from megascale.data.batches import SequenceSet
from megascale.data.open_data import OpenData
from megascale.model.decoder import Decoder
from megascale.model.loss import IGNORED
from megascale.model.residual import AltUpResidual
from megascale.parallel.world import World

BATCH = 16
"""Sequences of one forward pass. Rows are independent, so it does not change the result."""


@torch.no_grad()
def held_out_loss(
    decoder: Decoder, sequences: SequenceSet, count: int, token_bytes: np.ndarray | None, world: World
) -> dict[str, float]:
    """loss (nats per token), bits_per_byte where the tokenizer is known, tokens, of the first `count` sequences, shared by the ranks."""
    count = min(count, len(sequences))
    sums = torch.zeros(3, dtype=torch.float64)
    device = world.device.torch
    one = torch.ones((), device=device)
    for start in range(world.rank * BATCH, count, world.size * BATCH):
        batch = sequences.sequences(range(start, min(start + BATCH, count)))
        here = batch.to(device)
        losses = decoder.losses(here.tokens, here.positions, here.documents, here.labels, one)
        labels = batch.labels[batch.labels != IGNORED]
        text = int(token_bytes[labels.numpy()].sum()) if token_bytes is not None else 0
        sums += torch.tensor([float(losses.token_losses.double().sum()), labels.numel(), text], dtype=torch.float64)
    nats, tokens, text = world.sum(sums).tolist()
    result = {"loss": nats / tokens, "tokens": tokens}
    if text:
        result["bits_per_byte"] = nats / math.log(2) / text
    return result


@torch.no_grad()
def block_divergence(decoder: Decoder, sequences: SequenceSet, device: torch.device) -> dict[str, float]:
    """AltUp's health on one held-out sequence: per layer, |x_i - mean| / |mean| over the K blocks; and the mean correction gain."""
    batch = sequences.sequences(range(1)).to(device)
    metrics: dict[str, float] = {}

    def watch(name: str, state: Tensor) -> None:
        wide = state.float()
        mean = wide.mean(2, keepdim=True)
        metrics[f"altup/layer_{int(name):02d}/divergence"] = float((wide - mean).norm() / mean.norm() / wide.shape[2] ** 0.5)

    decoder.hidden(batch.tokens, batch.positions, batch.documents, watch=watch)
    gains = torch.stack([1 + module.correct for module in decoder.modules() if isinstance(module, AltUpResidual)])
    return metrics | {"altup/gain": float(gains.mean())}


def validate(decoder: Decoder, data: OpenData, config: Config, world: World) -> dict[str, float]:
    """The val/* metrics of all sources and, with K > 1, AltUp's."""
    metrics: dict[str, float] = {}
    decoder.eval()
    for name, sequences in data.validation.items():
        result = held_out_loss(decoder, sequences, config.validation.sequences, data.token_bytes, world)
        metrics |= {f"val/{name}/{key}": value for key, value in result.items() if key != "tokens"}
    if config.model.altup.blocks > 1 and data.validation:
        metrics |= block_divergence(decoder, next(iter(data.validation.values())), world.device.torch)
    decoder.train()
    return metrics
