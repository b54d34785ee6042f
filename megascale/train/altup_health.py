"""AltUp's health on one held-out sequence. T tokens, P streams, K blocks, L layers.

A layer takes the blocks x to A x + g F. The product of the A over the layers is how the blocks' start reaches the end and the last gradient
the start; unconstrained mixes of many layers may blow it up (arXiv 2512.24880, section 3.1, whose measure of gain this is).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.data.batches import SequenceSet
from megascale.model.altup import AltUpResidual, Parts
from megascale.model.attention import Packing
from megascale.model.decoder import Layer
from megascale.model.origin import Origin
from megascale.model.strided import SequenceResidual
from megascale.parallel.mesh import Mesh
from megascale.parallel.pipeline import Stages


@torch.no_grad()
def altup_health(stages: Stages, sequences: SequenceSet, model: Model, mesh: Mesh) -> dict[str, float]:
    """The altup/* metrics: the mean correction gain g; with K > 1 also, by layer, |x_i - mean| / |mean| over the blocks behind it, and the
    gains of the mixes. A and g of token-dependent coefficients are means over the tokens and streams.
    """
    blocks = model.altup.blocks
    # by layer: squares of the difference and of the mean, sum and number of the gains, number of ranks, A; every rank adds its part
    sums = torch.zeros(model.layers, 5 + blocks**2, dtype=torch.float64)

    def note(layer: int, residual: Any, parts: Parts, update: Tensor, state: Tensor) -> None:
        if isinstance(residual, SequenceResidual):
            sums[layer, 2:4] = torch.tensor([1 + float(residual.correct), 1.0])
        if isinstance(residual, AltUpResidual):
            wide = state.double()
            mean = wide.mean(2, keepdim=True)
            gains = 1 + residual.coefficients(parts, update)[1].double()
            squares = [(wide - mean).square().sum() / state.shape[2], mean.square().sum()]
            sums[layer, :3] = torch.stack([*squares, gains.sum()]).cpu()
            sums[layer, 3:5] = torch.tensor([gains.numel(), 1])
            sums[layer, 5:] = residual.mixing(parts, update).flatten().cpu()

    with _watched(stages, note):
        stages.evaluate(sequences.sequences(range(1)))
    sums = mesh.world.sum(sums)
    difference, mean, gain, number = sums[:, :4].T
    metrics = {"altup/gain": float(gain.sum() / number.sum())}
    if blocks > 1:
        mixes = (sums[:, 5:] / sums[:, 4:5]).unflatten(1, (blocks, blocks))
        columns = {"divergence": (difference / mean).sqrt(), **mix_gains(mixes)}
        metrics |= {f"altup/layer_{i:02d}/{name}": float(x) for name, values in columns.items() for i, x in enumerate(values)}
    return metrics


def mix_gains(mixes: Tensor) -> dict[str, Tensor]:
    """forward_gain and backward_gain [L] of mixes [L, K, K]; see `megascale.observe.metrics`."""
    forward, backward = [mixes[0]], [mixes[-1]]
    for mix in mixes[1:]:
        forward.append(mix @ forward[-1])
    for mix in mixes[:-1].flip(0):
        backward.append(backward[-1] @ mix)
    return {
        "forward_gain": torch.stack(forward).abs().sum(2).amax(1),
        "backward_gain": torch.stack(backward[::-1]).abs().sum(1).amax(1),
    }


@contextmanager
def _watched(stages: Stages, note: Any) -> Iterator[None]:
    """Layers run eagerly, in their two halves, and are shown with what they take and give."""
    usual = [(decoder, decoder.run_layer) for decoder in stages.modules()]
    for decoder in stages.modules():
        numbers = {id(layer): int(name) for name, layer in decoder.layers.items()}

        def run(
            layer: Layer, state: Tensor, packing: Packing, origin: Origin, numbers: dict[int, int] = numbers
        ) -> tuple[Tensor, dict[str, Tensor]]:
            parts = layer.residual.split(state)
            update, report = layer.forward(state, packing, origin, only_update=True)
            state = layer.residual.forward(parts, update, packing)
            note(numbers[id(layer)], layer.residual, parts, update, state)
            return state, report

        decoder.run_layer = run
    try:
        yield
    finally:
        for decoder, run_layer in usual:
            decoder.run_layer = run_layer
