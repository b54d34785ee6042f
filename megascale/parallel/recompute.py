"""Recomputation: what a backward pass needs is computed again instead of kept (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.model.attention import Packing
from megascale.model.decoder import Decoder
from megascale.model.origin import Origin
from megascale.model.streams import join_reports
from megascale.parallel.expert_exchange import remember_numbers
from megascale.parallel.rebuild import rebuild_states

Report = dict[str, Tensor]
Part = Callable[[Tensor, Packing, Origin], tuple[Tensor, Report]]
"""A layer, or a stage: the next state and the routers' reports."""
Recomputed = Callable[[Part, Tensor, Packing, Origin], tuple[Tensor, Report]]


def _again(part: Part, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, Report]:
    """Runs a part, of which the backward pass finds what it needs by running it again."""
    # the model draws no random numbers from torch's generators, so their state need not be kept
    return checkpoint(part, state, packing, origin, use_reentrant=False, preserve_rng_state=False, context_fn=remember_numbers)


def _again_with_its_graph(part: Part, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, Report]:
    """`_again`, but the backward pass goes through the graph of the second run. ZeRO 3 needs that: it gathers and releases a module's
    weights around each of its runs, and would release those whose backward pass has set the second run off.
    """
    names: list[str] = []

    def run(state: Tensor) -> tuple[Tensor, ...]:
        new, report = part(state, packing, origin)
        names[:] = report
        return new, *report.values()

    if torch.is_grad_enabled() and not state.requires_grad:  # frozen parameters before it: there would be no backward pass
        state = state.detach().requires_grad_()
    new, *values = checkpoint(run, state, use_reentrant=True, preserve_rng_state=False)
    return new, dict(zip(names, values, strict=True))


def _stream_by_stream(
    recomputed: Recomputed, decoder: Decoder, state: Tensor, packing: Packing, origin: Origin
) -> tuple[Tensor, Report]:
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
        last, report = recomputed(decoder.run, one, packing, alone)
        states.append(last)
        reports.append(report)
    return torch.cat(states, 1), join_reports(reports)


def apply_recompute(decoder: Decoder, mode: str, gathers: bool = False) -> None:
    """Set what a stage keeps for the backward pass, in place. With one stream (of a phase, or here) the mode `stream` keeps everything:
    that is the memory it asks for.

    Args:
        mode: `parallel.recompute`.
        gathers: whether the engine gathers weights in the order of the forward pass, at each module's run (ZeRO 3). Then the states of K
            residual blocks are not rebuilt, which does not keep to that order (`megascale.parallel.rebuild`).
    """
    recomputed = _again_with_its_graph if gathers else _again
    if mode == "layer" and (gathers or not rebuild_states(decoder)):
        decoder.run_layer = recomputed
    elif mode == "stream" and len(decoder.streams_here) > 1:
        decoder.run_streams = partial(_stream_by_stream, recomputed)
