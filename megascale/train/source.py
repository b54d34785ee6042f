"""A trained model to take weights from: a run's checkpoint or a Hugging Face folder, read rectangle by rectangle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.fold import folded
from megascale.checkpoint.folders import list_checkpoints, step_of
from megascale.checkpoint.hugging_face.folder import TOKENIZER, is_hugging_face, open_hugging_face
from megascale.checkpoint.hugging_face.read import HuggingFaceTensors
from megascale.checkpoint.hugging_face.side_files import KEPT
from megascale.checkpoint.hugging_face.tensors import parameter_shapes
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.tensors import Tensors
from megascale.checkpoint.weights import WEIGHTS, check_weights
from megascale.config.errors import InputError
from megascale.config.phases import span_at
from megascale.config.schema import Config, Model
from megascale.data.digests import value_digest
from megascale.data.open_data import open_source as open_corpus
from megascale.train.load_run import open_checkpoint, read_run_config


@dataclass(frozen=True)
class Source:
    """A trained model.

    Attributes:
        place: the folder, as the user gave it.
        step: of the run's checkpoint; none for a Hugging Face folder.
        model: resolved, with the vocabulary's size.
        tensors: its weights and buffers, named as in checkpoints.
        fingerprint: digest of what says at a glance which files these are; equal on all hosts that see the same.
        tokenizer: tokenizer.json; none where there is none.
        side_files: folder with config.json and the tokenizer's files of a Hugging Face model; none for a model made here.
        recent: losses of the run's last steps.
        data_digest: of the run's corpora.
    """

    place: Path
    step: int | None
    model: Model
    tensors: Tensors
    fingerprint: str
    tokenizer: Path | None
    side_files: Path | None
    recent: tuple[float, ...] = ()
    data_digest: str | None = None


@contextmanager
def open_source(place: Path, step: int | None = None, verify: bool = True) -> Iterator[Source]:
    """Open a trained model; files are closed at the end of the block.

    Args:
        place: a run folder or a Hugging Face folder.
        step: of the run's checkpoint; none = the newest good one.
        verify: check every file's digest, where there are some (one rank does). Without it `step` has to be given for a run.

    Raises:
        InputError: neither is there, no good checkpoint (of this step), a tensor is missing, a step of a Hugging Face folder.
    """
    if is_hugging_face(place):
        if step is not None:
            raise InputError(f"step {step}", f"{place} is a Hugging Face folder, which has no steps", "leave it out")
        yield _hugging_face(place)
        return
    if not (place / "config.yaml").is_file():
        reason = "is no model: it has neither config.yaml nor config.json" if place.is_dir() else "there is no such folder"
        raise InputError(str(place), reason, "give a run folder (runs/NAME) or a Hugging Face folder")
    config = read_run_config(place)
    assert verify or step is not None
    with open_checkpoint(place, step, verify) as reader:
        yield _run(place, config, reader)


def _hugging_face(place: Path) -> Source:
    found = open_hugging_face(place)
    files = sorted({stored.file for stored in found.files.stored.values()})
    fingerprint = value_digest([found.values, [(file.name, file.stat().st_size) for file in files]])
    tokenizer = place / TOKENIZER if (place / TOKENIZER).is_file() else None
    return Source(place, None, found.model, HuggingFaceTensors(found), fingerprint, tokenizer, place)


def _run(place: Path, config: Config, reader: CheckpointReader) -> Source:
    model = span_at(config, reader.step).config.model  # an early phase has fewer streams
    model = model.model_copy(update={"vocab_size": reader.shape(f"{WEIGHTS}embedding.weight")[0]})
    reader, model = folded(reader, model)
    check_weights(reader, parameter_shapes(model))
    return Source(
        place,
        reader.step,
        model,
        reader,
        value_digest({name: record.digest for name, record in reader.manifest.files.items()}),
        run_tokenizer(config),
        place / KEPT if (place / KEPT).is_dir() else None,
        tuple(reader.state.get("recovery", {}).get("recent", ())),
        reader.state.get("data_digest"),
    )


def model_of(place: Path) -> Model:
    """The model of a run folder (at its newest checkpoint) or a Hugging Face folder, resolved. Weights are not read.

    Raises:
        InputError: neither is there.
    """
    newest = next((step_of(path) for path in list_checkpoints(place / "checkpoints")), None)
    if newest is None and (place / "config.yaml").is_file():
        return read_run_config(place).model
    with open_source(place, newest, verify=newest is None) as source:
        return source.model


def run_tokenizer(config: Config) -> Path | None:
    """tokenizer.json of a run; none where it has none, or its corpora are not here."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer) if Path(config.data.tokenizer).is_file() else None
    for source in config.data.sources:
        try:
            corpus = open_corpus(source.path, config.data.validation_fraction)
        except InputError:
            continue
        if corpus.tokenizer is not None:
            return Path(corpus.tokenizer)
    return None
