"""An opened Hugging Face folder: config and tensors checked against each other before anything is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.hugging_face.families import Family
from megascale.checkpoint.hugging_face.files import TensorFiles
from megascale.checkpoint.hugging_face.settings import family_of, read_model
from megascale.checkpoint.hugging_face.tensors import Piece, pieces_of
from megascale.config.errors import InputError
from megascale.config.schema import Model

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that fp32 holds exactly."""

_INVERSE_FREQUENCIES = ".rotary_emb.inv_freq"
"""A buffer that old Llama files hold; it follows from config.json, and transformers does not read it either."""
_ROWS = 4096


@dataclass(frozen=True)
class HuggingFaceModel:
    """A folder with config.json and safetensors files, whose tensors are exactly those of the model.

    Attributes:
        folder: where it is.
        values: content of config.json.
        family, model: what config.json describes.
        pieces: one for each tensor that belongs to the model.
        files: where they are.
        left_out: tensors that say nothing new, each with the reason; nothing else in the files is unread.
    """

    folder: Path
    values: dict[str, Any]
    family: Family
    model: Model
    pieces: list[Piece]
    files: TensorFiles
    left_out: dict[str, str]

    def read(self, piece: Piece) -> Tensor:
        """A piece in our order and dtype."""
        return piece.to_ours(self.files.read(piece.theirs)).to(piece.dtype).contiguous()

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Stored dtype of each tensor, by their name."""
        return {piece.theirs: self.files.stored[piece.theirs].dtype for piece in self.pieces}

    @property
    def context(self) -> int | None:
        """max_position_embeddings, tokens; none where config.json does not say."""
        return self.values.get("max_position_embeddings")


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model, and not like a run."""
    return (folder / CONFIG).is_file() and not (folder / "config.yaml").exists()


def open_hugging_face(folder: Path) -> HuggingFaceModel:
    """Open a folder and check config, names, shapes and dtypes.

    Raises:
        InputError: names the file and the key or tensor that is missing, unknown, or not as config.json says.
    """
    values = _read_config(folder / CONFIG)
    place = str(folder / CONFIG)
    family, model = family_of(values, place), read_model(values, place)
    files = TensorFiles(folder)
    pieces = pieces_of(family, model)
    for piece in pieces:
        _check(piece, files)
    left_out = {}
    for name in files.stored.keys() - {piece.theirs for piece in pieces}:
        left_out[name] = _reason_to_leave_out(name, family, model, files)
    return HuggingFaceModel(folder, values, family, model, pieces, files, left_out)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(str(path), "there is no such file", "give a folder in Hugging Face's format") from error
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"cannot be read as JSON ({error})", "is it damaged?") from error
    if not isinstance(values, dict):
        raise InputError(str(path), "is not a table of settings", "is it damaged?")
    return values


def _check(piece: Piece, files: TensorFiles) -> None:
    stored = files.stored.get(piece.theirs)
    if stored is None:
        raise InputError(str(files.folder), f"lacks the tensor {piece.theirs} of shape {piece.their_shape}", "is it complete?")
    if stored.shape != piece.their_shape:
        reason = f"tensor {piece.theirs} has shape {stored.shape}, config.json says {piece.their_shape}"
        raise InputError(str(stored.file), reason, "does config.json belong to these weights?")
    if stored.dtype not in (FLOATS if piece.trained else (piece.dtype,)):
        reason = f"tensor {piece.theirs} has dtype {stored.dtype}: quantised and fp64 weights are not supported"
        raise InputError(str(stored.file), reason, "give the fp32, bf16 or fp16 weights")


def _reason_to_leave_out(name: str, family: Family, model: Model, files: TensorFiles) -> str:
    embedding, head = family.tensors["embedding.weight"], family.tensors["head.weight"]
    stored = files.stored[name]
    if name == head and model.tie_embeddings:
        if not _equal(name, embedding, files):
            reason = f"tensor {name} differs from {embedding}, but config.json says tie_word_embeddings true"
            raise InputError(str(stored.file), reason, "set tie_word_embeddings to false in a copy of config.json")
        return f"equal to {embedding}, tied"
    if name.endswith(_INVERSE_FREQUENCIES):
        return "rotary frequencies follow from config.json"
    raise InputError(str(stored.file), f"tensor {name} does not belong to a {family.model_type} model of this config", _FOREIGN)


_FOREIGN = "does config.json belong to these weights?"


def _equal(name: str, other: str, files: TensorFiles) -> bool:
    one, two = files.stored[name], files.stored[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    blocks = (slice(start, start + _ROWS) for start in range(0, one.shape[0], _ROWS))
    return all(torch.equal(files.read(name, rows), files.read(other, rows)) for rows in blocks)
