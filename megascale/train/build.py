"""From a resolved config to the parts of a run: data, model, engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from megascale.config.schema import Config
from megascale.data.open_data import OpenData, open_data
from megascale.model.decoder import FP32_PARAMETERS, Decoder
from megascale.model.initialize import initialize
from megascale.parallel.apply import apply
from megascale.parallel.plain import PlainEngine
from megascale.parallel.world import World
from megascale.train.compiling import compile_layers
from megascale.train.groups import optimizer_groups


@dataclass(frozen=True)
class Parts:
    """What the training loop works with."""

    config: Config
    """resolved, with the vocabulary's size"""
    data: OpenData
    decoder: Decoder
    engine: PlainEngine


def open_run_data(config: Config) -> tuple[Config, OpenData]:
    """The data, and the config with the vocabulary's size filled in."""
    data = open_data(config.data, config.run.seed, config.model.vocab_size)
    model = config.model.model_copy(update={"vocab_size": data.vocab_size})
    return config.model_copy(update={"model": model}), data


def cast(decoder: nn.Module, precision: str) -> dict[str, Tensor]:
    """Give the model its precision, in place, and return the fp32 weights by global name: those of bf16 parameters are copies (masters)."""
    weights: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        weights[name] = parameter.detach()
        if precision == "bf16" and not any(fnmatchcase(name, pattern) for pattern in FP32_PARAMETERS):
            parameter.data = parameter.detach().to(torch.bfloat16)
    return weights


def build(config: Config, data: OpenData, world: World, say: Callable[[str], None]) -> Parts:
    """Build the model, connect it for the layout, compile it, give it an engine. `config` knows the vocabulary's size."""
    decoder = Decoder(config.model)
    initialize(decoder, config.model, config.run.seed)
    decoder.to(world.device.torch)
    groups = optimizer_groups(decoder.named_parameters(), config.optimizer)
    weights = cast(decoder, config.precision)
    apply(decoder, config, world)
    compile_layers(decoder, config.compile, world.device.torch, say)
    return Parts(config, data, decoder, PlainEngine(groups, weights, dict(decoder.named_parameters()), config.optimizer, world))
