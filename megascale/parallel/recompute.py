"""Recomputation: what a backward pass needs is computed again instead of kept (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.model.attention import Packing
from megascale.model.decoder import Decoder, Layer
from megascale.model.origin import Origin
from megascale.model.streams import join_reports
from megascale.parallel.rebuild import rebuild_states


def _recomputed_layer(layer: Layer, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, dict[str, Any]]:
    # the model draws no random numbers from torch's generators, so their state need not be kept
    return checkpoint(layer, state, packing, origin, use_reentrant=False, preserve_rng_state=False)


def _stream_by_stream(decoder: Decoder, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, dict[str, Tensor]]:
    """`Decoder.run` for one stream after the other; of each, its last state is kept.

    Exact: streams meet in the aggregator alone, routers count each stream by itself and draw by its number. The backward pass takes the
    streams last to first, and runs each again before its own (as gradient caching does, arXiv 2101.06983), on all ranks in that order.
    """
    if not torch.is_grad_enabled():  # nothing is kept anyway
        return decoder.run(state, packing, origin)
    count = decoder.config.streams.count
    # split: its backward puts the gradients together once, that of an index would fill a P-wide zero tensor for each stream
    inputs = [state] * count if state.shape[1] == 1 else state.split(1, 1)
    states, reports = [], []
    for number, one in enumerate(inputs):
        last, report = checkpoint(
            decoder.run, one, packing, origin.of_stream(number), use_reentrant=False, preserve_rng_state=False
        )
        states.append(last)
        reports.append(report)
    return torch.cat(states, 1), join_reports(reports)


def apply_recompute(decoder: Decoder, mode: str, rebuilds: bool = True) -> None:
    """Set what a stage keeps for the backward pass, in place. A phase with one stream keeps everything in the mode `stream`: that is the
    memory it asks for.

    Args:
        mode: `parallel.recompute`.
        rebuilds: whether the states of K residual blocks may be rebuilt where that saves memory (`megascale.parallel.rebuild`).
    """
    if mode == "layer" and (not rebuilds or not rebuild_states(decoder)):
        decoder.run_layer = _recomputed_layer
    elif mode == "stream" and decoder.config.streams.count > 1:
        decoder.run_streams = _stream_by_stream
