"""Starting a run from another model's weights (`start` in the config): opened, checked and digested once, then read by every rank.

The first checkpoint holds everything, and what the run has to know of the model it came from: a resume does not need that model again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.folders import list_checkpoints
from megascale.checkpoint.hugging_face.side_files import keep
from megascale.checkpoint.layout import Shape
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.tensors import ORIGIN, Tensors, origin_record
from megascale.config.errors import InputError
from megascale.config.phases import spans
from megascale.config.schema import Config, Model
from megascale.data.open_data import OpenData
from megascale.data.tokenizer import load_tokenizer
from megascale.parallel.agreement import tell
from megascale.parallel.world import World
from megascale.train.inherit import Inheritance, check_start, first_loss, inherit
from megascale.train.source import Source, open_source


@dataclass(frozen=True)
class Start:
    """The model that a run starts from.

    Attributes:
        model: its config.
        record: path, step, digest and model: what checkpoints keep of it. The digest is of weights (see `weights_digest`).
        freeze: whether its tensors stay as they are.
        tensors: its tensors; none when a checkpoint of the run holds all that is needed.
        recent: its last losses on the same corpora; empty where they are not known.
    """

    model: Model
    record: Mapping[str, Any]
    freeze: bool
    tensors: Tensors | None = None
    recent: tuple[float, ...] = ()


def recorded(folder: Path) -> dict[str, Any] | None:
    """What the checkpoints of a run folder say of the model it came from; none where there is no checkpoint, or it came from none."""
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            return CheckpointReader(path).state.get(ORIGIN)
        except CheckpointError:
            continue
    return None


def plan_start(config: Config) -> Start | None:
    """The start of a run that may not begin yet (dry runs): checked, but neither digested nor read.

    Raises:
        InputError: as `open_start`, except for the tokenizer.
    """
    if config.start.model is None:
        return None
    record = recorded(Path(config.run.folder) / config.run.name)
    if record is not None:
        return _resumed(config, record)
    with open_source(Path(config.start.model), config.start.step) as source:
        # a dry run without a corpus may not know the vocabulary
        _check(source.model, config)
        return Start(source.model, {}, config.start.freeze)


def open_start(config: Config, data: OpenData, world: World, folder: Path, files: ExitStack) -> Start | None:
    """The start of a run, on all ranks together. Rank 0 checks and digests; the others open what it has found good.

    Args:
        config: with the vocabulary's size.
        folder: of the run; the tokenizer's files of a Hugging Face model are kept there.
        files: closes the model's files.

    Raises:
        InputError: the model cannot be read, or the run's is not that model plus streams, experts or blocks; the same on all ranks.
    """
    if config.start.model is None:
        return None
    record, failure, source = None, None, None
    if world.rank == 0:
        try:
            record = recorded(folder)
            if record is None:
                source = files.enter_context(open_source(Path(config.start.model), config.start.step))
                _check(source.model, config)
                _check_tokenizer(source, data)
                if source.side_files is not None:
                    keep(source.side_files, folder)
                record = origin_record(source.place, source.step, source.model, source.tensors)
                record |= {"fingerprint": source.fingerprint}
        except InputError as error:
            failure = error
    _raise_first(world, failure)
    record = world.broadcast(record)
    if "fingerprint" not in record:
        return _resumed(config, record)
    try:
        source = source or files.enter_context(open_source(Path(config.start.model), record["step"], verify=False))
        if source.fingerprint != record["fingerprint"]:
            reason = "holds other files on this host than on rank 0's"
            failure = InputError(f"rank {world.rank}: start.model: {source.place}", reason, "give all hosts the same model")
    except InputError as error:
        failure = error
    _raise_first(world, failure)
    assert source is not None
    record = {key: value for key, value in record.items() if key != "fingerprint"}
    recent = source.recent if source.data_digest == data.digest else ()
    return Start(source.model, record, config.start.freeze, source.tensors, recent)


def _resumed(config: Config, record: Mapping[str, Any]) -> Start:
    model = Model.model_validate_json(json.dumps(record["model"]))
    return Start(model, record, config.start.freeze)


def _raise_first(world: World, failure: InputError | None) -> None:
    """Raise the first rank's failure on all ranks. Rank 0 prints it: a launcher ends it as soon as another rank has ended."""
    failures = [found for found in world.gather(failure) if found is not None]
    if not failures:
        return
    if world.rank == 0:
        tell(failures[0])
    failures[0].told = True
    raise failures[0]


def _check(before: Model, config: Config) -> None:
    """Whether the run may start from this model."""
    first = spans(config)[0].config.model
    if first.vocab_size is None:
        first = first.model_copy(update={"vocab_size": before.vocab_size})
    check_start(before, first, str(config.start.model))
    if not config.start.freeze:
        return
    if before.experts.count < first.experts.count:
        reason = "only routers would be trained, and while all experts of a layer are alike there is nothing for them to learn"
        raise InputError("start.freeze", reason, "set start.freeze=false")
    if not inherit(before, first).new:
        where = "the first phase" if config.schedule.phases else "the model"
        remedy = "set start.freeze=false, or add streams: model.streams.count=2"
        raise InputError("start.freeze", f"{where} adds nothing to {config.start.model}: all would be frozen", remedy)


def _check_tokenizer(source: Source, data: OpenData) -> None:
    """Ids mean the same tokens to the model and in the corpora; the corpora's tokenizer may have ids more."""
    if source.tokenizer is None or data.tokenizer is None:
        return
    theirs = {number: token for token, number in load_tokenizer(source.tokenizer).get_vocab().items()}
    for token, number in sorted(data.tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if theirs.get(number, token) != token:
            reason = f"the corpora have another tokenizer: id {number} is {token!r} there and {theirs[number]!r} in the model's"
            remedy = f"prepare the corpora with --tokenizer {source.tokenizer}"
            raise InputError(f"start.model: {source.place}", reason, remedy)


class InheritedTensors:
    """The start of a model as if it were a checkpoint: the other model's tensors under the names of ours."""

    def __init__(self, tensors: Tensors, heritage: Inheritance):
        self.tensors, self.heritage, self.path = tensors, heritage, tensors.path

    def names(self) -> list[str]:
        """See `Tensors`."""
        return sorted(self.heritage.taken)

    def shape(self, name: str) -> Shape:
        """See `Tensors`."""
        return self.heritage.shapes[name]

    def read(self, name: str, offsets: Shape | None = None, sizes: Shape | None = None) -> torch.Tensor:
        """See `Tensors`. Of experts that are copies, the one that there is is read once."""
        shape, source = self.shape(name), self.heritage.taken[name]
        offsets = (0,) * len(shape) if offsets is None else offsets
        sizes = tuple(extent - offset for extent, offset in zip(shape, offsets, strict=True)) if sizes is None else sizes
        if len(self.tensors.shape(source)) == len(shape):
            return self.tensors.read(source, offsets, sizes)
        return self.tensors.read(source, offsets[1:], sizes[1:]).expand(sizes)


def frozen_by(start: Start | None, model: Model) -> frozenset[str]:
    """The parameters of a phase's model that the start keeps as they are."""
    return inherit(start.model, model).inherited if start is not None and start.freeze else frozenset()


def describe(start: Start, heritage: Inheritance, model: Model) -> list[str]:
    """Lines for the user about what a run begins with."""
    step = "" if start.record["step"] is None else f", step {start.record['step']}"
    counts = f"{len(heritage.inherited)} tensors are taken over, {len(heritage.new)} are new"
    lines = [
        f"starting from {start.record['path']}{step} (weights {start.record['digest'][:12]}): {counts}",
        first_loss(start.model, model),
    ]
    if 1 < start.model.streams.count < model.streams.count:
        lines.append(f"the prefixes and the aggregator of its {start.model.streams.count} streams are not taken over")
    if start.freeze:
        lines.append(f"only what is new is trained; {len(heritage.inherited)} tensors stay as they are")
    return lines
