"""Recomputed layers with K residual blocks: each keeps its update, from which the states between the layers are built again.

T tokens, P streams, K blocks, d width, L layers of the stage. A recomputed layer needs its input state, [T, P, K, d] with AltUp. Kept are
the first state of a stage and the update [T, P, d] of each layer; the coefficients make the states of them, by the same operations as in
the forward pass, so to the bit.

The backward pass asks for the states from the last to the first. It holds those at the halves, quarters, ... of the way, log2 L of
them, and builds each state about log2(L) / 2 times (as in Griewank & Walther 2000, "Algorithm 799: Revolve").
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megascale.model.attention import Packing
from megascale.model.decoder import Decoder, Layer
from megascale.model.origin import Origin
from megascale.parallel.expert_exchange import remember_numbers


def rebuilding_saves(layers: int, blocks: int) -> bool:
    """Whether L updates, the first state and those held in the backward pass are less than L states."""
    return layers + blocks * (1 + math.ceil(math.log2(max(layers, 1)))) < layers * blocks


@dataclass(frozen=True)
class _Handle:
    """Stands for a block of a state in the graph of the forward pass."""

    chain: _Chain
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Chain:
    """The states of one forward pass through a stage, number i before its i-th layer. The handles in the graph keep it alive."""

    def __init__(self, start: Tensor):
        self.states = {0: start.detach()}
        self.steps: list[tuple[Layer, Packing, Tensor]] = []
        self.end = weakref.ref(start)

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        """Saved tensors as they are, but for the blocks of the newest state."""
        number, newest = len(self.steps), self.end()  # a weak reference, because the graph keeps this function
        if number == 0 or newest is None or tensor.untyped_storage()._cdata != newest.untyped_storage()._cdata:
            return tensor
        return _Handle(self, number, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def add(self, layer: Layer, packing: Packing, update: Tensor, state: Tensor) -> None:
        """A layer has made the next state."""
        self.steps.append((layer, packing, update.detach()))
        self.end = weakref.ref(state)

    def state(self, number: int) -> Tensor:
        """Built again where it is not held. Later states, and what only they need, are let go: nobody asks for them again."""
        assert number <= len(self.steps), "a graph whose layers are rebuilt can be differentiated once"
        del self.steps[number:]
        self.states = {i: state for i, state in self.states.items() if i <= number}
        here = max(self.states)
        while here < number:
            halfway, state = here + (number - here + 1) // 2, self.states[here]
            for step in self.steps[here:halfway]:
                state = _next_state(state, *step)
            here = halfway
            self.states[here] = state
        return self.states[number]


def _unpack(saved: Tensor | _Handle) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.chain.state(saved.number).as_strided(saved.size, saved.stride, saved.offset)


def _drop(saved: Tensor) -> Tensor:
    return saved.new_empty(0)


def _next_state(state: Tensor, layer: Layer, packing: Packing, update: Tensor) -> Tensor:
    # with gradients, as in the forward pass, so that a compiled layer runs the same kernels; what they would save is dropped
    with torch.enable_grad(), saved_tensors_hooks(_drop, _drop):
        parts = layer.residual.split(state.detach().requires_grad_())
        return layer.residual(parts, update.detach().requires_grad_(), packing).detach()


class RebuiltLayers:
    """How a decoder runs its layers (`Decoder.run_layer`): each recomputed, its input state rebuilt."""

    def __init__(self) -> None:
        self.chain: weakref.ref[_Chain] | None = None

    def __call__(self, layer: Layer, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, dict[str, Any]]:
        """The next state and the router's report."""
        if not torch.is_grad_enabled():
            return layer(state, packing, origin)
        chain = self.chain() if self.chain is not None else None
        if chain is None or chain.end() is not state:  # the first layer
            state = state.contiguous()  # of the same strides as the others, which torch.compile would else take for dynamic
            chain = _Chain(state)

        def update_of(*parts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return layer(parts, packing, origin, only_update=True)

        def next_of(update: Tensor, *parts: Tensor) -> Tensor:
            return layer.residual(parts, update, packing)

        parts = layer.residual.split(state)  # once, for the same gradients to the bit as without recomputation
        with saved_tensors_hooks(chain.pack, _unpack):
            update, report = _recomputed(update_of, *parts)
            new = _recomputed(next_of, update, *parts)
        chain.add(layer, packing, update, new)
        self.chain = weakref.ref(chain)
        return new, report

    def compile(self, decoder: Decoder) -> None:
        """Compile what is called beside the layers themselves, in place."""
        for layer in decoder.layers.values():
            assert isinstance(layer, Layer)
            layer.residual.compile()


def _recomputed(function: Any, *tensors: Tensor) -> Any:
    # the model draws no random numbers from torch's generators, so their state need not be kept
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=remember_numbers)


def rebuild_states(decoder: Decoder) -> bool:
    """Make a stage rebuild its states, in place, where that saves memory; whether it does."""
    if not rebuilding_saves(len(decoder.layers), decoder.config.altup.blocks):
        return False
    decoder.run_layer = RebuiltLayers()
    return True
