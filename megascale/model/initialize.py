"""Initial weights as a pure function of (seed, global name, row block), so that every layout starts from the same weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.routers import Router

Shape = tuple[int, ...]

PREFIX_STD = 0.02
"""Of prefix keys and values: initializer_range of the published models, whose own training code is not known (arXiv 2505.10475)."""
QUIET = (".prefix_v", ".prefix_network.value.weight", "aggregator.mix.weight")
"""What starts as zeros with `prefix_start: quiet`: values, which then add nothing, and the aggregator's last layer, whose result then is
the plain mean of the streams. Keys stay random: they make the streams differ, and all of these have gradients within two steps. On a
trained trunk something is added to the keys besides (`megascale.train.quiet`)."""
ONES = ("norm.weight", "residual.modality_norm")
"""Ends of the names of parameters that start as ones."""

ROWS = 256
"""Rows of a matrix drawn from one generator; a rank that holds some rows draws only the blocks it needs."""


def generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator keyed by (seed, key...)."""
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal_rectangle(seed: int, name: str, shape: Shape, std: float, offsets: Shape, sizes: Shape) -> Tensor:
    """A rectangle of the fp32 tensor N(0, std^2) that belongs to (seed, name, shape); only its blocks of rows are drawn.

    An expert is a row of its [E, ...] tensor.
    """
    start, stop = offsets[0], offsets[0] + sizes[0]
    inside = tuple(slice(offset, offset + size) for offset, size in zip(offsets[1:], sizes[1:], strict=True))
    block = 1 if len(shape) > 2 else ROWS
    rows = []
    for first in range(start // block * block, stop, block):
        size = min(block, shape[0] - first)
        drawn = torch.empty(size, *shape[1:]).normal_(0, std, generator=generator(seed, name, first // block))
        here = (slice(max(start - first, 0), stop - first), *inside)
        rows.append(drawn[here])
    return torch.cat(rows)


def initial_std(name: str, model: Model) -> float | None:
    """Standard deviation of a parameter's initial weights; none for constants (norms 1, biases and AltUp 0).

    Projections back into the residual are divided by sqrt(2 L), so that its variance does not grow with depth (GPT-2). AltUp's
    modalities are tanh(W n / d) of normalised tokens n: sqrt(d) makes them of order one.
    """
    if name.endswith(".residual.modality"):
        return math.sqrt(model.width)
    if name.endswith((*ONES, "bias")) or ".residual." in name:
        return None
    if model.streams.prefix_start == "quiet" and name.endswith(QUIET):
        return None
    if name.endswith((".o.weight", ".down.weight", ".down")):
        return model.init_std / math.sqrt(2 * model.layers)
    if ".prefix_network." in name:
        return _network_std(name, model)
    if ".prefix_" in name:
        return PREFIX_STD
    return model.init_std


def _network_std(name: str, model: Model) -> float:
    """Such that the prefixes start with PREFIX_STD: the input of tanh is N(0, 1), whose tanh has the variance 0.394."""
    hidden = model.streams.reparameterise
    assert hidden is not None
    if name.endswith(".embedding"):
        return 1.0
    return 1 / math.sqrt(hidden) if name.endswith(".hidden.weight") else PREFIX_STD / math.sqrt(0.394 * hidden)


@torch.no_grad()
def fill(parameter: Tensor, name: str, model: Model, seed: int, shape: Shape, offsets: Shape) -> None:
    """Give a parameter its initial weights in place; it is the rectangle at `offsets` of the global tensor `name` of this shape."""
    std = initial_std(name, model)
    if std is not None:
        parameter.copy_(normal_rectangle(seed, name, shape, std, offsets, tuple(parameter.shape)))
    elif name.endswith(ONES):
        parameter.fill_(1)
    else:
        parameter.zero_()


def initialize(decoder: nn.Module, model: Model, seed: int) -> None:
    """Fill all parameters of a whole decoder in place."""
    for name, parameter in decoder.named_parameters():
        fill(parameter, name, model, seed, tuple(parameter.shape), (0,) * parameter.ndim)
    start_routers(decoder, seed)


@torch.no_grad()
def start_routers(decoder: nn.Module, seed: int, id_counts: Tensor | None = None) -> None:
    """Set the buffers of all routers of a decoder or stage, in place; see `Router.start`."""
    for name, module in decoder.named_modules():
        if isinstance(module, Router):
            module.start(seed, int(name.split(".")[1]), id_counts)
