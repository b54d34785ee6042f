"""torch.compile of the layers, where a compiler is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from megascale.config.errors import InputError
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


def compile_layers(
    decoders: Sequence[Decoder], mode: Literal["auto", "on", "off"], device: torch.device, say: Callable[[str], None]
) -> None:
    """Compile each layer of these decoders (or stages) and the loss, in place. All layers of one kind share one compilation.

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
    for decoder in decoders:
        for layer in decoder.layers.values():
            layer.compile()
        if isinstance(decoder.run_layer, RebuiltLayers):
            decoder.run_layer.compile(decoder)
    LossKernels.compile()
