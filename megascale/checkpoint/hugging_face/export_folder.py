"""From a checkpoint to a folder that transformers reads: a known family's format, or any composition with its own code."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.files import encode_json
from megascale.checkpoint.hugging_face.families import MEGASCALE, PARSCALE, Family
from megascale.checkpoint.hugging_face.files import Planned, write_tensors
from megascale.checkpoint.hugging_face.folder import CONFIG, TOKENIZER
from megascale.checkpoint.hugging_face.import_folder import DTYPES as STORED_DTYPES
from megascale.checkpoint.hugging_face.settings import (
    choose_family,
    essential,
    family_of,
    read_model,
    refuse_uncomputed,
    write_settings,
)
from megascale.checkpoint.hugging_face.side_files import KEPT, TOKENIZER_CONFIG, give_back, kept_config, new_folder
from megascale.checkpoint.hugging_face.tensors import Piece, pieces_of
from megascale.checkpoint.layout import DTYPES, dtype_name, volume
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.weights import check_weights
from megascale.config.schema import Model

CODE = ("configuration_megascale", "modeling_megascale", "residual_megascale")
_MAPPED = 32 * 2**20
_CLASSES = {
    MEGASCALE.model_type: ("MegascaleConfig", "MegascaleForCausalLM"),
    PARSCALE.model_type: ("ParScaleConfig", "Qwen2ParScaleForCausalLM"),
}
"""What of the first two files of CODE config.json names, for the families that transformers has no class for."""


@dataclass(frozen=True)
class Export:
    """What is exported and how.

    Attributes:
        run_folder: of the run; its kept Hugging Face files are used where there are any.
        model: its resolved config, with the vocabulary's size.
        tokenizer: tokenizer.json of a run that was not imported; none: it has none.
        neutral: values for config.json that the model does not decide (eos_token_id, max_position_embeddings).
        dtype: of all weights; none: each tensor as it was imported, fp32 for weights that were trained here.
        largest: bytes of a weights file.
    """

    run_folder: Path
    model: Model
    tokenizer: Path | None
    neutral: Mapping[str, Any]
    dtype: torch.dtype | None
    largest: int


def export_checkpoint(reader: CheckpointReader, export: Export, target: Path) -> dict[str, Any]:
    """Write a checkpoint's weights as a Hugging Face folder. One tensor is in memory at a time.

    Returns:
        Facts for the user, of JSON types.

    Raises:
        InputError: the target exists, or the weights are not those of the config.
        OSError: the disk is full.
    """
    family, values = _settings(export)
    pieces = pieces_of(family, export.model)
    check_weights(reader, {piece.ours: piece.shape for piece in pieces if piece.trained})
    dtypes = _dtypes(reader, pieces, export.dtype)
    if dtypes != _stored_dtypes(reader):
        values = _with_dtype(values, {dtypes[piece.theirs] for piece in pieces if piece.trained})
    source = _Source(reader, dtypes)
    with new_folder(target) as folder:
        files = write_tensors(folder, [source.planned(piece) for piece in pieces], export.largest)
        assert source.read == Counter(piece.theirs for piece in pieces), "each tensor is written once"
        if family.custom_code:
            classes = [f"{file}.{name}" for file, name in zip(CODE, _CLASSES[family.model_type], strict=False)]
            values["auto_map"] = dict(zip(("AutoConfig", "AutoModelForCausalLM"), classes, strict=True))
            for file in CODE:
                shutil.copyfile(Path(__file__).with_name(f"{file}.py"), folder / f"{file}.py")
        (folder / CONFIG).write_bytes(encode_json(values, indent=2))
        side = give_back(export.run_folder, folder) or _own_tokenizer(export, folder)
    return {
        "folder": str(target),
        "family": family.model_type,
        "step": reader.step,
        "tensors": len(pieces),
        "parameters": sum(volume(piece.sizes) for piece in pieces if piece.trained),
        "dtypes": sorted({dtype_name(dtype) for dtype in dtypes.values()}),
        "files": [*files, CONFIG, *(f"{file}.py" for file in CODE if family.custom_code), *side],
        "tokenizer": TOKENIZER in side,
    }


def _settings(export: Export) -> tuple[Family, dict[str, Any]]:
    """The family, and the content of config.json: the kept one as it is where it still describes the model."""
    kept = kept_config(export.run_folder)
    if kept is not None:
        place = str(export.run_folder / KEPT / CONFIG)
        if essential(read_model(kept, place)) == essential(export.model):
            return family_of(kept, place), {key: value for key, value in kept.items() if key != "auto_map"}
    family = choose_family(export.model, kept.get("model_type") if kept is not None else None)
    if family is MEGASCALE:
        refuse_uncomputed(export.model)
    return family, write_settings(family, export.model, kept if kept is not None else export.neutral)


def _stored_dtypes(reader: CheckpointReader) -> dict[str, torch.dtype]:
    """The dtype in which each tensor was imported; nothing for weights that were trained here."""
    stored: Mapping[str, str] = reader.state.get(STORED_DTYPES, {})
    return {name: DTYPES[text] for name, text in stored.items()}


def _dtypes(reader: CheckpointReader, pieces: list[Piece], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    known = _stored_dtypes(reader)
    chosen = {piece.theirs: dtype or known.get(piece.theirs, torch.float32) for piece in pieces}
    return chosen | {piece.theirs: piece.dtype for piece in pieces if not piece.trained}  # a bias that moves by 0.001 needs fp32


def _with_dtype(values: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """config.json names the dtype in which transformers holds the weights: any but the widest would round some of them."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    rest = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}
    return {**rest, "torch_dtype": dtype_name(widest)}


class _Source:
    """Reads pieces of a checkpoint. Mapped files count as memory: they are given back after some bytes, not after each of
    thousands of tensors, because opening a file reads its whole description.
    """

    def __init__(self, reader: CheckpointReader, dtypes: Mapping[str, torch.dtype]):
        self.reader, self.dtypes, self.read, self.mapped = reader, dtypes, Counter[str](), 0

    def planned(self, piece: Piece) -> Planned:
        """The tensor to write for a piece."""
        return Planned(piece.theirs, self.dtypes[piece.theirs], piece.their_shape, partial(self._elements, piece))

    def _elements(self, piece: Piece) -> Tensor:
        if self.mapped > _MAPPED:
            self.reader.close()  # reading opens it again
            self.mapped = 0
        self.read[piece.theirs] += 1
        ours = self.reader.read(piece.stored, piece.offsets, piece.sizes)
        self.mapped += ours.nbytes
        return piece.to_theirs(ours).to(self.dtypes[piece.theirs])


def _own_tokenizer(export: Export, target: Path) -> list[str]:
    """tokenizer.json of the corpus, and what AutoTokenizer wants beside it."""
    if export.tokenizer is None:
        return []
    shutil.copyfile(export.tokenizer, target / TOKENIZER)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (target / TOKENIZER_CONFIG).write_bytes(encode_json(settings, indent=2))
    return [TOKENIZER, TOKENIZER_CONFIG]
