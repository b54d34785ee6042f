"""torch.compile of the layers, where a compiler is found."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from megascale.config.errors import InputError
from megascale.kernels.attention import PrefixMaths
from megascale.model.decoder import Decoder
from megascale.model.loss import LossKernels
from megascale.parallel.rebuild import RebuiltLayers


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine; none when it can run."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler (g++ or clang++) is on the PATH"
    if device.type != "cpu" and not torch.utils._triton.has_triton():
        return "triton does not work here"
    return None


def keep_graph_order() -> None:
    """Graphs of one function are tried in the order of their compilation, not the last used first: a recomputed layer must meet the graph
    of its forward pass again, not a more general one that other layers or micro-batches have used meanwhile (pytorch issue 166926).
    """
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]


class _HiddenGradients:
    """Takes the fp32 gradients off bf16 parameters while a layer is traced, and puts them back.

    torch.compile cannot represent such a pair and splits a layer's graph at each of them (torch 2.13: "dtype mismatch between tensor
    and its gradient"). No graph depends on what gradients there are.
    """

    def __init__(self) -> None:
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.taken: list[tuple[nn.Parameter, Tensor]] = []

    def take(self, event: CallbackArgs) -> None:
        """Before anything is compiled."""
        if event.callback_trigger is not CallbackTrigger.DYNAMO:  # a backward pass was traced with its forward pass
            return
        for module in self.modules:
            for parameter in module.parameters():
                if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                    self.taken.append((parameter, parameter.grad))
                    parameter.grad = None

    def put_back(self, _event: CallbackArgs) -> None:
        """Behind it, whether it worked or not."""
        for parameter, gradient in self.taken:
            parameter.grad = gradient
        self.taken.clear()

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Do so for these modules too."""
        self.modules.update(modules)
        if self.take not in callback_handler.start_callbacks:  # torch._dynamo.reset() forgets it
            callback_handler.register_start_callback(self.take)
            callback_handler.register_end_callback(self.put_back)


_hidden_gradients = _HiddenGradients()


def compile_layers(
    decoders: Sequence[Decoder], mode: Literal["auto", "on", "off"], device: torch.device, say: Callable[[str], None]
) -> None:
    """Compile each layer of these decoders (or stages), their end and the loss, in place. All layers of one kind share one compilation.

    Raises:
        InputError: mode is on and there is no compiler. With auto the run says so and goes on eagerly.
    """
    if mode == "off":
        return
    missing = missing_compiler(device)
    if missing and mode == "on":
        raise InputError("compile: on", missing, "install one, or set compile=off")
    if missing:
        say(f"training eagerly: {missing}")
        return
    keep_graph_order()
    # one entry per (kind of layer, computed block, training or not), and a second one when a batch ramp changes the shapes
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    _hidden_gradients.watch(decoders)
    for decoder in decoders:
        for layer in decoder.layers.values():
            layer.compile()
        if isinstance(decoder.run_layer, RebuiltLayers):
            decoder.run_layer.compile(decoder)
        decoder.run_end = torch.compile(decoder.run_end)
    LossKernels.compile()
    PrefixMaths.compile()
