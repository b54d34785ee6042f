"""Recomputation: what a backward pass needs is computed again instead of kept (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.model.attention import Packing
from megascale.model.decoder import Decoder, Layer
from megascale.model.origin import Origin


def _recomputed_layer(layer: Layer, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, dict[str, Any]]:
    # the model draws no random numbers from torch's generators, so their state need not be kept
    return checkpoint(layer, state, packing, origin, use_reentrant=False, preserve_rng_state=False)


def apply_recompute(decoder: Decoder, mode: str) -> None:
    """Set what a stage keeps for the backward pass, in place; `mode` is `parallel.recompute`."""
    if mode == "layer":
        decoder.run_layer = _recomputed_layer
