"""What the activations of one forward and backward pass are, by component, at the moment when most of them are alive.

`python -m benchmarks memory`. Counted op by op on tensors without values, as `--dry-run` does; on a GPU also what its allocator says. A
tensor belongs to the component that made it, in the forward pass or in a recomputation; what backward passes make is their own.
Weights, their gradients and the optimizer's state come on top: `--dry-run` has them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import attempt, peak_allocated_mib, print_table, write_result
from benchmarks.step import Shape, axes, decoder_of, plain, step_of
from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.decoder import Decoder
from megascale.model.layers import RMSNorm, SwiGLU
from megascale.model.residual import AltUpResidual, SequenceResidual, SingleResidual
from megascale.model.routing import Experts
from megascale.model.streams import Aggregator
from megascale.model.vocabulary import Embedding
from megascale.parallel.meta_memory import MetaMemory

COMPONENTS: dict[type[nn.Module], str] = {
    Attention: "attention",
    SwiGLU: "feed_forward",
    Experts: "experts",
    RMSNorm: "norms",
    SingleResidual: "residual",
    AltUpResidual: "residual",
    SequenceResidual: "residual",
    Aggregator: "aggregator",
    Embedding: "embedding",
}
HEAD, SUMS, BACKWARD = "head_and_loss", "sums", "backward"
"""Head: of a chunk of tokens; sums: of a layer's input with attention and feed-forward."""
NAMES = (*dict.fromkeys(COMPONENTS.values()), HEAD, SUMS, BACKWARD)


class ComponentMemory(MetaMemory):
    """The bytes alive by component when most were."""

    def __init__(self, state: Iterable[Tensor]):
        super().__init__(state)
        self.component = SUMS
        self.maker: dict[int, str] = {}
        self.by_component: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()

    def _count(self, x: Tensor) -> None:
        key, before = x.untyped_storage()._cdata, self.now
        super()._count(x)
        if key in self.alive and key not in self.maker:
            self.maker[key] = self.component
            self.by_component[self.component] += self.now - before
        if self.now == self.peak > before:
            self.at_peak = self.by_component.copy()

    def _forget(self, key: int, reference: object) -> None:
        self.by_component[self.maker.pop(key)] -= self.alive[key][1]
        super()._forget(key, reference)

    @contextmanager
    def inside(self, component: str) -> Iterator[None]:
        """What is made now belongs to it."""
        outer, self.component = self.component, component
        try:
            yield
        finally:
            self.component = outer


def _label(decoder: Decoder, memory: ComponentMemory) -> None:
    """Let each component's calls say whose they are."""

    def within(component: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with memory.inside(component):
            return call(*arguments, **keywords)

    for module in decoder.modules():
        if type(module) in COMPONENTS:
            module.forward = partial(within, COMPONENTS[type(module)], module.forward)
    assert decoder.head is not None
    decoder.head.loss = partial(within, HEAD, decoder.head.loss)  # type: ignore[method-assign]


def component_row(name: str, shape: Shape, recompute: str, device: torch.device) -> dict[str, object]:
    """MiB alive at the peak, whole and by component; on a GPU also the growth of its allocator's peak."""
    model = axes(plain(shape), shape)[name]
    decoder = decoder_of(model, shape, "meta", recompute)
    state = [x for p in decoder.parameters() for x in (p, p.grad) if x is not None]
    memory = ComponentMemory(state)
    _label(decoder, memory)
    sequences = shape.sequences.get(name)
    forward, backward = step_of(decoder, shape, torch.device("meta"), sequences)
    with memory:
        loss = forward()
        with memory.inside(BACKWARD):
            backward(loss)
    row: dict[str, object] = {"model": name, "recompute": recompute, "sequences": sequences or shape.batch}
    row["alive_mib"] = memory.peak / 2**20
    row |= {part: memory.at_peak[part] / 2**20 for part in NAMES}
    if device.type == "cuda":
        allocated, failure = attempt(partial(_allocated_mib, model, shape, recompute, device, sequences))
        row["allocator_mib"] = failure or allocated
    return row


def _allocated_mib(model: Model, shape: Shape, recompute: str, device: torch.device, sequences: int | None) -> float | None:
    """The growth of the allocator's peak in a second pass: in the first one libraries allocate their own."""
    decoder = decoder_of(model, shape, device.type, recompute)
    forward, backward = step_of(decoder, shape, device, sequences)
    return [peak_allocated_mib(device, lambda: backward(forward())) for _ in range(2)][-1]


def main(arguments: list[str]) -> None:
    """Measure and store the table."""
    parser = argparse.ArgumentParser("python -m benchmarks memory", description=__doc__)
    Shape.add_arguments(parser)
    given = parser.parse_args(arguments)
    shape, device = Shape.of(given), torch.device(given.device)
    rows = []
    for name in axes(plain(shape), shape):
        for recompute in ("none", "layer"):
            rows.append(component_row(name, shape, recompute, device))
            path = write_result(f"memory-{device.type}", ["memory", *arguments], rows)  # after each, in case the time runs out
    print_table(rows)
    print("stored in", path)
