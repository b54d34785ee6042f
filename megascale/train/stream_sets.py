"""Sets of streams on one trunk: taken from a run, put on a loaded model. The trunk's tensors are shared, never copied."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from megascale.checkpoint.stream_set import StreamSet, is_set, read_set
from megascale.checkpoint.tensors import weights_digest
from megascale.checkpoint.weights import WEIGHTS
from megascale.config.errors import InputError
from megascale.config.schema import Model, Streams
from megascale.model.decoder import Decoder
from megascale.train.build import cast
from megascale.train.inherit import Inheritance, inherit
from megascale.train.load_run import LoadedModel, Precision
from megascale.train.source import Source, open_source
from megascale.train.team import whole

Loaded = TypeVar("Loaded", bound=LoadedModel)


def without_streams(model: Model) -> Model:
    """The trunk of a model: P = 1."""
    return model.model_copy(update={"streams": Streams()})


def _split(model: Model) -> Inheritance:
    """What of a model is its trunk, and what belongs to its streams."""
    return inherit(without_streams(model), model)


def trunk_digest(source: Source) -> str:
    """Digest of all weights but those of the streams. Reads them all."""
    return weights_digest(source.tensors, _split(source.model).taken)


def set_of_run(folder: Path, step: int | None = None) -> StreamSet:
    """The streams of a run's checkpoint, with the digest of its trunk.

    Raises:
        InputError: there is no such checkpoint, or the model has one stream.
    """
    with open_source(folder, step) as source:
        if source.model.streams.count == 1:
            raise InputError(str(folder), "has no streams: model.streams.count is 1", "give a run with several streams")
        tensors = {name: source.tensors.read(WEIGHTS + name).clone() for name in sorted(_split(source.model).new)}
        origin = {"run": str(folder), "step": source.step}
        return StreamSet(str(folder), source.model.streams, trunk_digest(source), tensors, origin)


def open_set(place: Path) -> StreamSet:
    """A set that was saved, or the streams of a run's newest checkpoint, or of a Hugging Face folder.

    Raises:
        InputError: neither is there.
    """
    return read_set(place) if is_set(place) else set_of_run(place)


def with_streams(loaded: Loaded, chosen: StreamSet | None) -> Loaded:
    """The same trunk with other streams; none = without, P = 1. Both models stay usable, side by side.

    Raises:
        InputError: the set was trained beside another trunk; several ranks have the trunk.
    """
    if loaded.world.size > 1:
        reason = f"the trunk is on {loaded.world.size} ranks, and streams can be put on that of one process only"
        raise InputError("--streams", reason, "leave the launcher out, or `megascale convert` both into one model first")
    model = without_streams(loaded.config.model)
    tensors: dict[str, nn.Parameter] = {}
    if chosen is not None:
        _check_trunk(loaded, chosen)
        model = model.model_copy(update={"streams": chosen.streams})
        tensors = {name: nn.Parameter(tensor.clone(), requires_grad=False) for name, tensor in chosen.tensors.items()}
        cast(tensors, precision_of(loaded))
    with torch.device("meta"):
        decoder = Decoder(model)
    trunk = decoder.state_dict().keys() - _split(model).new
    state = {name: tensor for name, tensor in loaded.decoder.state_dict().items() if name in trunk}
    state |= {name: tensor.detach().to(loaded.world.device.torch) for name, tensor in tensors.items()}
    decoder.load_state_dict(state, strict=True, assign=True)
    if model.tie_embeddings:
        assert decoder.head is not None and decoder.embedding is not None
        decoder.head.weight = decoder.embedding.weight
    config = loaded.config.model_copy(update={"model": model})
    return dataclasses.replace(loaded, config=config, stages=whole(decoder.eval().requires_grad_(False), config, loaded.world))


def _check_trunk(loaded: LoadedModel, chosen: StreamSet) -> None:
    if "trunk" not in loaded.known:
        with open_source(loaded.folder, loaded.checkpoint_step) as source:
            loaded.known["trunk"] = trunk_digest(source)
    if loaded.known["trunk"] != chosen.trunk:
        reason = f"was trained beside another trunk, of digest {chosen.trunk}; that of {loaded.folder} is {loaded.known['trunk']}"
        origin = f"it comes from {chosen.origin['run']}" + (
            f", step {chosen.origin['step']}" if chosen.origin["step"] is not None else ""
        )
        raise InputError(f"--streams {chosen.place}", reason, f"{origin}: give the model that this run started from")


def precision_of(loaded: LoadedModel) -> Precision:
    """In which the weights were loaded."""
    assert loaded.decoder.embedding is not None
    return "bf16" if loaded.decoder.embedding.weight.dtype == torch.bfloat16 else "fp32"
