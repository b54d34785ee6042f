"""A trained run, opened for evaluation and generation in one process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megascale.checkpoint.folders import list_checkpoints, step_of
from megascale.checkpoint.load import CheckpointReader, newest_good
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config, Parallel
from megascale.data.digests import value_digest
from megascale.data.open_data import OpenData
from megascale.data.tokenizer import separator_id
from megascale.model.decoder import Decoder
from megascale.parallel.device import choose_device
from megascale.parallel.mesh import alone
from megascale.parallel.pipeline import Stages
from megascale.parallel.world import World
from megascale.train.build import cast, open_run_data

WEIGHTS = "model/"
"""What the names of a checkpoint's weights start with; the rest is optimizer state."""


@dataclass(frozen=True)
class LoadedRun:
    """A run whose weights are on this process's device.

    Attributes:
        folder: as the user gave it.
        step: of the checkpoint that was read.
        checkpoint: digest of that checkpoint.
        config: resolved, with the vocabulary's size.
        data: the corpora that the run was trained on; `data.tokenizer` is None where they have none.
        decoder: in evaluation mode, without gradients.
        world: this process alone, and its device.
        separator: id of the token between documents; None without a tokenizer.
        starts_with_separator: documents start with the separator (prepared corpora); else they only end with it (Megatron pairs).
    """

    folder: Path
    step: int
    checkpoint: str
    config: Config
    data: OpenData
    decoder: Decoder
    world: World
    separator: int | None
    starts_with_separator: bool

    @property
    def stages(self) -> Stages:
        """The decoder as the only stage of a process that works alone, whatever layout it was trained in."""
        config = self.config.model_copy(update={"parallel": Parallel()})
        return Stages({0: self.decoder}, config, alone(self.world.device))

    def encode(self, text: str) -> list[int]:
        """Ids of a document that starts with `text`, the separator before it included where documents start with one.

        Raises:
            InputError: the run has no tokenizer.
        """
        if self.data.tokenizer is None or self.separator is None:
            raise InputError(str(self.folder), "the run's corpora have no tokenizer", "set data.tokenizer in its config.yaml")
        ids = self.data.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.separator, *ids] if self.starts_with_separator else ids


def load_run(folder: Path, step: int | None = None, precision: Literal["fp32", "bf16"] = "fp32") -> LoadedRun:
    """Open a run folder: its config, its data, and the weights of one checkpoint.

    Args:
        folder: runs/NAME.
        step: of the checkpoint; None: the newest good one.
        precision: of the weights in memory; the saved weights are fp32.

    Raises:
        InputError: no run there, its data is gone, no good checkpoint (of this step), weights that do not fit the config.
    """
    config, data = open_run_data(read_run_config(folder))
    reader = open_checkpoint(folder, step)
    world = World(0, 1, choose_device(0, 1))
    with reader:
        decoder = _read_decoder(config, reader)
    cast(dict(decoder.named_parameters()), precision)
    decoder.to(world.device.torch).eval().requires_grad_(False)
    starts = data.train.sources[0].sequences.split.starts_with_separator
    digest = value_digest({name: record.digest for name, record in reader.manifest.files.items()})
    return LoadedRun(folder, reader.step, digest, config, data, decoder, world, _separator(data, starts), starts)


def read_run_config(folder: Path) -> Config:
    """The resolved config of a run folder.

    Raises:
        InputError: there is no run, or its config is damaged.
    """
    kept = folder / "config.yaml"
    if not kept.is_file():
        reason = "is not a run folder: it has no config.yaml" if folder.is_dir() else "there is no such run folder"
        raise InputError(str(folder), reason, "give the folder of a run, for example runs/quickstart")
    return resolve(load_config(kept).config)


def open_checkpoint(folder: Path, step: int | None) -> CheckpointReader:
    """The checkpoint of a step, verified; the newest good one for None.

    Raises:
        InputError: there is none, none of this step, or it is damaged.
    """
    checkpoints = folder / "checkpoints"
    found = list_checkpoints(checkpoints)
    if not found:
        raise InputError(str(checkpoints), "the run has no checkpoint yet", "train on, or stop it: a stop saves one")
    if step is None:
        newest = newest_good(checkpoints, lambda line: print(line, file=sys.stderr, flush=True))
        assert newest is not None  # there are checkpoints, and newest_good raises when none is good
        return newest
    path = next((path for path in found if step_of(path) == step), None)
    if path is None:
        steps = ", ".join(str(number) for number in sorted({step_of(path) for path in found}))
        raise InputError("--step", f"{checkpoints} has no checkpoint of step {step}", f"it has those of steps {steps}")
    reader = CheckpointReader(path)
    reader.verify()
    return reader


def _read_decoder(config: Config, reader: CheckpointReader) -> Decoder:
    """The decoder with the saved fp32 weights, on the CPU; nothing is initialised first."""
    with torch.device("meta"):
        decoder = Decoder(config.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    saved = {name.removeprefix(WEIGHTS) for name in reader.names() if name.startswith(WEIGHTS)}
    if saved - shapes.keys():
        unknown = ", ".join(sorted(saved - shapes.keys())[:3])
        raise InputError(str(reader.path), f"holds weights that the model does not have: {unknown}", _CONFIG_CHANGED)
    weights = {}
    for name, shape in shapes.items():
        if name not in saved:
            raise InputError(str(reader.path), f"lacks the weight {name}", _CONFIG_CHANGED)
        if reader.shape(WEIGHTS + name) != shape:
            reason = f"weight {name} has shape {reader.shape(WEIGHTS + name)}, the model's has {shape}"
            raise InputError(str(reader.path), reason, _CONFIG_CHANGED)
        weights[name] = reader.read(WEIGHTS + name)
    decoder.load_state_dict(weights, strict=False, assign=True)
    if config.model.tie_embeddings:
        assert decoder.head is not None and decoder.embedding is not None
        decoder.head.weight = decoder.embedding.weight  # assigning has given the embedding a parameter of its own
    return decoder


_CONFIG_CHANGED = "is config.yaml in the run folder the one that it was trained with?"


def _separator(data: OpenData, starts_with_separator: bool) -> int | None:
    """The id before each document as the corpus has it, which is not always the one that the tokenizer suggests."""
    if data.tokenizer is None:
        return None
    if starts_with_separator:
        return int(data.train.sources[0].sequences.split.document(0)[0])
    return separator_id(data.tokenizer)
