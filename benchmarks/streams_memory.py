"""Memory and time of forward + backward with P streams: everything kept, recomputed layer by layer, and stream by stream.

`python -m benchmarks streams_memory`. Two measures of memory: the most bytes of tensors alive at a time, beside weights and their
gradients (counted op by op on tensors without values, as `--dry-run` does), and how far the resident size of a fresh process grew
(weights, gradients, and what kernels and allocator take, included). Eager, dense layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.measure import interleaved, peak_memory_mib, print_table, write_result
from benchmarks.step import plain
from megascale.config.resolve import resolve
from megascale.config.schema import Config, Streams
from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from megascale.parallel.meta_memory import MetaMemory
from megascale.parallel.recompute import apply_recompute
from megascale.train.build import cast

MODES = ("none", "layer", "stream")
STREAMS = (1, 2, 4, 8)


def decoder_of(width: int, layers: int, streams: int, mode: str, precision: str, device: str) -> Decoder:
    """A decoder that recomputes in this mode, its fp32 gradients there from the start, as an engine has them."""
    model = plain(width, layers).model_copy(update={"streams": Streams(count=streams)})
    model = resolve(Config(model=model)).model
    with torch.device(device):
        decoder = Decoder(model)
    if device != "meta":
        initialize(decoder, model, 1)
    cast(dict(decoder.named_parameters()), precision)
    for parameter in decoder.parameters():
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    apply_recompute(decoder, mode)
    return decoder


def step_of(decoder: Decoder, batch: int, length: int, device: str) -> Callable[[], None]:
    """A function that runs one forward and backward pass."""
    positions = torch.arange(length, device=device).expand(batch, -1)
    tokens, documents = torch.zeros_like(positions), torch.zeros_like(positions)
    scale = torch.full((), 1 / (batch * length), device=device)

    def run() -> None:
        losses = decoder.losses(tokens, positions, documents, tokens, scale)
        assert losses.lm is not None
        losses.lm.backward()

    return run


def alive_mib(width: int, layers: int, streams: int, mode: str, precision: str, batch: int, length: int) -> float:
    """Most MiB of tensors alive at a time, beside weights and gradients."""
    decoder = decoder_of(width, layers, streams, mode, precision, "meta")
    state = [x for p in decoder.parameters() for x in (p, p.grad) if x is not None]
    with MetaMemory(state) as memory:
        step_of(decoder, batch, length, "meta")()
    return memory.peak / 2**20


def _run_twice(width: int, layers: int, streams: int, mode: str, precision: str, batch: int, length: int) -> None:
    run = step_of(decoder_of(width, layers, streams, mode, precision, "cpu"), batch, length, "cpu")
    run()
    run()


def main(arguments: list[str]) -> None:
    """Measure and store the table."""
    parser = argparse.ArgumentParser("python -m benchmarks streams_memory", description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    shape, rest = (given.width, given.layers), (given.precision, given.batch, given.length)
    rows: list[dict[str, object]] = []
    for streams in STREAMS:
        modes = MODES if streams > 1 else MODES[:2]
        runs = {
            mode: step_of(decoder_of(*shape, streams, mode, given.precision, "cpu"), given.batch, given.length, "cpu")
            for mode in modes
        }
        times = interleaved(runs, given.rounds)
        for mode in modes:
            alive = alive_mib(*shape, streams, mode, *rest)
            process = peak_memory_mib(_run_twice, *shape, streams, mode, *rest)
            row: dict[str, object] = {"P": streams, "recompute": mode, "alive_mib": alive, "process_mib": process}
            rows.append({**row, **times[mode], "time_over_none": times[mode]["best_s"] / times["none"]["best_s"]})
    print_table(rows)
    command = f"python -m benchmarks streams_memory {' '.join(arguments)}".strip()
    print("stored in", write_result(f"streams-memory-{given.precision}", command, rows))
