"""Memory and time of forward + backward with P streams: everything kept, recomputed layer by layer, and stream by stream.

`python -m benchmarks streams_memory`. Two measures of memory: the most bytes of tensors alive at a time, beside weights and their
gradients (counted op by op on tensors without values, as `--dry-run` does), and how far the resident size of a fresh process grew
(weights, gradients, and what kernels and allocator take, included). Eager, dense layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.measure import interleaved, peak_memory_mib, print_table, write_result
from benchmarks.step import Shape, decoder_of, plain, step_of
from megascale.config.schema import Model, Streams
from megascale.parallel.meta_memory import MetaMemory

MODES = ("none", "layer", "stream")
STREAMS = (1, 2, 4, 8)


def _model(shape: Shape, streams: int) -> Model:
    return plain(shape).model_copy(update={"streams": Streams(count=streams)})


def _step(shape: Shape, streams: int, mode: str) -> Callable[[], None]:
    """A function that runs one forward and backward pass of a decoder that recomputes in this mode."""
    decoder = decoder_of(_model(shape, streams), shape, shape.device, mode)
    forward, backward = step_of(decoder, shape, torch.device(shape.device))
    return lambda: backward(forward())


def alive_mib(shape: Shape, streams: int, mode: str) -> float:
    """Most MiB of tensors alive at a time, beside weights and gradients."""
    decoder = decoder_of(_model(shape, streams), shape, "meta", mode)
    forward, backward = step_of(decoder, shape, torch.device("meta"))
    with MetaMemory([x for p in decoder.parameters() for x in (p, p.grad) if x is not None]) as memory:
        backward(forward())
    return memory.peak / 2**20


def _run_twice(shape: Shape, streams: int, mode: str) -> None:
    run = _step(shape, streams, mode)
    run()
    run()


def main(arguments: list[str]) -> None:
    """Measure and store the table."""
    parser = argparse.ArgumentParser("python -m benchmarks streams_memory", description=__doc__)
    Shape.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(width=256, layers=8, batch=4, device="cpu")
    given = parser.parse_args(arguments)
    shape = replace(Shape.of(given), device="cpu")
    rows: list[dict[str, object]] = []
    for streams in STREAMS:
        modes = MODES if streams > 1 else MODES[:2]
        times = interleaved({mode: _step(shape, streams, mode) for mode in modes}, given.rounds)
        for mode in modes:
            alive, process = alive_mib(shape, streams, mode), peak_memory_mib(_run_twice, shape, streams, mode)
            row: dict[str, object] = {"P": streams, "recompute": mode, "alive_mib": alive, "process_mib": process}
            rows.append({**row, **times[mode], "time_over_none": times[mode]["best_s"] / times["none"]["best_s"]})
    print_table(rows)
    print("stored in", write_result(f"streams-memory-{shape.precision}", ["streams_memory", *arguments], rows))
