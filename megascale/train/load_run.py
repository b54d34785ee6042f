"""A trained model, opened for evaluation and generation by one process or several: a run folder, or a Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from megascale.checkpoint.fold import folded
from megascale.checkpoint.folders import list_checkpoints, step_of
from megascale.checkpoint.hugging_face.folder import is_hugging_face
from megascale.checkpoint.hugging_face.import_folder import is_import
from megascale.checkpoint.hugging_face.side_files import kept_config
from megascale.checkpoint.hugging_face.tensors import parameter_shapes
from megascale.checkpoint.load import CheckpointReader, newest_good
from megascale.checkpoint.weights import WEIGHTS, check_weights
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.phases import span_at
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.data.batches import SequenceSet
from megascale.data.digests import value_digest
from megascale.data.open_data import OpenData
from megascale.data.tokenizer import load_tokenizer, separator_id, token_bytes, vocabulary_size
from megascale.model.decoder import Decoder
from megascale.parallel.pipeline import Stages
from megascale.parallel.world import World
from megascale.train.build import open_run_data
from megascale.train.team import Team, check_layout, open_stages

if TYPE_CHECKING:
    from megascale.checkpoint.stream_set import StreamSet

__all__ = ["WEIGHTS", "LoadedModel", "LoadedRun", "load_model", "load_run", "open_checkpoint", "read_run_config"]

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class LoadedModel:
    """A model whose weights are on this process's device, with what turns text into ids.

    Attributes:
        folder: as the user gave it.
        step: of the checkpoint that was read; 0 for weights that were not trained here.
        config: resolved, with the vocabulary's size; of a Hugging Face folder only model and data.sequence_length mean anything.
        stages: this rank's part, in evaluation mode, without gradients.
        tokenizer: None where there is none.
        token_bytes: bytes of text of each id; see `OpenData`.
        validation: held-out sequences by source.
        start: ids before each document.
        separator: id that ends a document; None without a tokenizer.
        known: what was found out about the weights in the folder, shared by all models on one trunk.
    """

    folder: Path
    step: int
    config: Config
    stages: Stages
    tokenizer: Tokenizer | None
    token_bytes: np.ndarray | None
    validation: Mapping[str, SequenceSet]
    start: tuple[int, ...]
    separator: int | None
    known: dict[str, str] = field(default_factory=dict, kw_only=True, compare=False)

    @property
    def checkpoint_step(self) -> int | None:
        """Of the checkpoint that the weights come from; none in a Hugging Face folder."""
        return None if is_hugging_face(self.folder) else self.step

    def with_streams(self, chosen: StreamSet | None) -> LoadedModel:
        """The same trunk with other streams, or (none) with one: P is chosen for each generation. The trunk's tensors are shared.

        Raises:
            InputError: the set was trained beside another trunk; several ranks have the trunk.
        """
        from megascale.train.stream_sets import with_streams

        return with_streams(self, chosen)

    @property
    def world(self) -> World:
        """The ranks that have the model, and this one's device."""
        return self.stages.mesh.world

    @property
    def decoder(self) -> Decoder:
        """The whole model, of a process that works alone."""
        assert self.world.size == 1
        (decoder,) = self.stages.modules()
        return decoder

    def encode(self, text: str) -> list[int]:
        """Ids of a document that starts with `text`, those before it included where documents start with some.

        Raises:
            InputError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                str(self.folder), "there is no tokenizer", "set data.tokenizer in config.yaml, or add tokenizer.json"
            )
        return [*self.start, *self.tokenizer.encode(text, add_special_tokens=False).ids]


@dataclass(frozen=True)
class LoadedRun(LoadedModel):
    """A run that was trained here.

    Attributes:
        checkpoint: digest of the checkpoint that was read.
        data: the corpora that the run was trained on.
    """

    checkpoint: str
    data: OpenData


def load_model(
    folder: Path, step: int | None = None, precision: Precision = "fp32", team: Team | None = None, length: int | None = None
) -> LoadedModel:
    """Open a run folder or a Hugging Face folder. Arguments and errors as in `load_run`; a Hugging Face folder has no steps."""
    team = team or Team.of_one()
    if not is_hugging_face(folder):
        if is_import(folder, step):
            return _load_import(folder, precision, team, length)
        return load_run(folder, step, precision, team, length)
    if step is not None:
        raise InputError("--step", f"{folder} is a Hugging Face folder, which has no steps", "leave it out")
    from megascale.train.load_hugging_face import load_hugging_face

    return load_hugging_face(folder, precision, team, length)


def load_run(
    folder: Path, step: int | None = None, precision: Precision = "fp32", team: Team | None = None, length: int | None = None
) -> LoadedRun:
    """Open a run folder: its config, its data, and the weights of one checkpoint.

    Args:
        folder: runs/NAME.
        step: of the checkpoint; None: the newest good one.
        precision: of the weights in memory; the saved weights are fp32.
        team: the ranks that share the model, all of which call this; by default this process has all of it.
        length: tokens of the sequences that the layout has to fit; by default those of the training.

    Raises:
        InputError: no run there, its data is gone, no good checkpoint (of this step), weights or a layout that do not fit the config.
    """
    team = team or Team.of_one()
    config, data = team.together(lambda: open_run_data(read_run_config(folder)))
    with _verified(folder, step, team) as reader:
        # an early phase has fewer streams
        whole, model = folded(reader, span_at(config, reader.step).config.model)
        config = config.model_copy(update={"model": model})
        stages = _open(config, whole, precision, team, length)
    starts = data.train.sources[0].sequences.split.starts_with_separator
    separator = _separator(data, starts)
    return LoadedRun(
        folder=folder,
        step=reader.step,
        config=config,
        stages=stages,
        tokenizer=data.tokenizer,
        token_bytes=data.token_bytes,
        validation=data.validation,
        start=(separator,) if starts and separator is not None else (),
        separator=separator,
        checkpoint=value_digest({name: record.digest for name, record in reader.manifest.files.items()}),
        data=data,
    )


def _verified(folder: Path, step: int | None, team: Team) -> CheckpointReader:
    """The checkpoint that rank 0 has chosen, and alone verified."""

    def choose() -> int:
        with open_checkpoint(folder, step) as reader:
            return reader.step

    chosen = team.of_leader(choose)
    return team.together(lambda: open_checkpoint(folder, chosen, verify=False))


def _open(config: Config, tensors: CheckpointReader, precision: Precision, team: Team, length: int | None) -> Stages:
    def fits() -> None:
        check_layout(config, team, length or config.data.sequence_length)
        check_weights(tensors, parameter_shapes(config.model))

    team.together(fits)
    return open_stages(config, tensors, precision, team)


def _load_import(folder: Path, precision: Precision, team: Team, length: int | None) -> LoadedModel:
    """The model of an imported run that was not trained yet; its tokenizer is data.tokenizer."""
    config = team.together(lambda: read_run_config(folder))
    with _verified(folder, 0, team) as reader:
        size = reader.shape(f"{WEIGHTS}embedding.weight")[0]
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
        stages = _open(config, reader, precision, team, length)
    path = Path(config.data.tokenizer) if config.data.tokenizer is not None else None
    return team.together(lambda: with_tokenizer(folder, config, stages, path, kept_config(folder) or {}))


def with_tokenizer(folder: Path, config: Config, stages: Stages, path: Path | None, values: Mapping[str, Any]) -> LoadedModel:
    """A model without corpora. Ids before a document are those that its tokenizer.json puts there.

    Args:
        path: of tokenizer.json; None: there is none.
        values: config.json, for eos_token_id (the first of several).

    Raises:
        InputError: the tokenizer cannot be read, or has more ids than the model.
    """
    tokenizer, sizes, separator = None, None, None
    start: tuple[int, ...] = ()
    if path is not None:
        tokenizer = load_tokenizer(path)
        assert config.model.vocab_size is not None
        if vocabulary_size(tokenizer) > config.model.vocab_size:
            reason = f"has ids up to {vocabulary_size(tokenizer) - 1}, the model {config.model.vocab_size} ids"
            raise InputError(str(path), reason, "does the tokenizer belong to this model?")
        sizes, start = token_bytes(tokenizer, config.model.vocab_size), _before_text(tokenizer)
        end = values.get("eos_token_id")
        end = next(iter(end), None) if isinstance(end, list) else end
        separator = separator_id(tokenizer) if end is None else int(end)
    return LoadedModel(folder, 0, config, stages, tokenizer, sizes, {}, start, separator)


def _before_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's own template puts before a text."""
    probe = "text"
    plain, whole = tokenizer.encode(probe, add_special_tokens=False).ids, tokenizer.encode(probe, add_special_tokens=True).ids
    count = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:count])


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


def open_checkpoint(folder: Path, step: int | None, verify: bool = True) -> CheckpointReader:
    """The checkpoint of a step, verified unless another rank has done so; the newest good one for None.

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
    if verify:
        reader.verify()
    return reader


def _separator(data: OpenData, starts_with_separator: bool) -> int | None:
    """The id before each document as the corpus has it, which is not always the one that the tokenizer suggests."""
    if data.tokenizer is None:
        return None
    if starts_with_separator:
        return int(data.train.sources[0].sequences.split.document(0)[0])
    return separator_id(data.tokenizer)
