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
    numbers = decoder.streams_here
    # split: its backward puts the gradients together once, that of an index would fill a P-wide zero tensor for each stream
    inputs = [state] * len(numbers) if state.shape[1] == 1 else state.split(1, 1)
    states, reports = [], []
    for number, one in zip(numbers, inputs, strict=True):
        alone = origin.of_streams(range(number, number + 1))
        last, report = checkpoint(decoder.run, one, packing, alone, use_reentrant=False, preserve_rng_state=False)
        states.append(last)
        reports.append(report)
    return torch.cat(states, 1), join_reports(reports)


def apply_recompute(decoder: Decoder, mode: str, rebuilds: bool = True) -> None:
    """Set what a stage keeps for the backward pass, in place. With one stream (of a phase, or here) the mode `stream` keeps everything:
    that is the memory it asks for.

    Args:
        mode: `parallel.recompute`.
        rebuilds: whether the states of K residual blocks may be rebuilt where that saves memory (`megascale.parallel.rebuild`).
    """
    if mode == "layer" and (not rebuilds or not rebuild_states(decoder)):
        decoder.run_layer = _recomputed_layer
    elif mode == "stream" and len(decoder.streams_here) > 1:
        decoder.run_streams = _stream_by_stream
