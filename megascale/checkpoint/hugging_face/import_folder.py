"""From a Hugging Face folder to a run folder: config.yaml, a checkpoint of step 0, and the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.folders import list_checkpoints, step_of
from megascale.checkpoint.hugging_face.folder import TOKENIZER, HuggingFaceModel, open_hugging_face
from megascale.checkpoint.hugging_face.read import HuggingFaceTensors
from megascale.checkpoint.hugging_face.side_files import KEPT, keep, new_folder
from megascale.checkpoint.hugging_face.tensors import Piece
from megascale.checkpoint.layout import Deferred, dtype_name, volume
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.tensors import ORIGIN, origin_record
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import LoadedConfig, validate
from megascale.config.tree import Tree
from megascale.config.write import dump

LONGEST = 4096
"""Most tokens of a sequence in the config of an imported run: long contexts need more memory than a start should ask for."""
DTYPES = "hugging_face_dtypes"
"""Entry of a checkpoint's state: the dtype in which each imported tensor was stored. Checkpoints of a training do not have it."""


def import_folder(source: Path, target: Path) -> dict[str, Any]:
    """Make a run folder out of a Hugging Face folder.

    Weights are stored in fp32, the dtype of masters, which holds bf16 and fp16 exactly. One tensor is in memory at a time.

    Args:
        source: with config.json and safetensors files.
        target: the new run folder, for example runs/NAME.

    Returns:
        Facts for the user, of JSON types.

    Raises:
        InputError: the source is not a model that megascale can compute, or the target exists.
        CheckpointError: the disk is full.
    """
    model = open_hugging_face(source)
    loaded = _run_config(model, target)
    config, warnings = loaded.config, check(loaded)
    with new_folder(target) as partial:
        (partial / "logs").mkdir()
        keep(source, partial)
        (partial / "config.yaml").write_text(dump(config))
        read = Counter[str]()
        origin = origin_record(source, None, model.model, HuggingFaceTensors(model))
        dtypes = {name: dtype_name(dtype) for name, dtype in model.dtypes.items()}
        save_checkpoint(
            partial / "checkpoints",
            0,
            [_rectangle(model, piece, read) for piece in model.pieces],
            {"progress": {}, "data_digest": None, DTYPES: dtypes, ORIGIN: origin},
            rank=0,
            world=1,
            gather=lambda one: [one],
            barrier=lambda: None,
        )
        unread = {piece.theirs for piece in model.pieces} ^ read.keys()
        assert not unread and set(read.values()) == {1}, f"each tensor is read once: {unread}"
    return {
        "folder": str(target),
        "family": model.family.model_type,
        "tensors": len(model.pieces),
        "parameters": sum(volume(piece.sizes) for piece in model.pieces if piece.trained),
        "dtypes": sorted(set(dtypes.values())),
        "left_out": model.left_out,
        "tokenizer": config.data.tokenizer,
        "warnings": warnings,
    }


def is_import(folder: Path, step: int | None = None) -> bool:
    """Whether a checkpoint of a run folder (of this step; none: the newest) holds imported weights that nothing has trained yet.

    Raises:
        CheckpointError: that checkpoint is damaged.
    """
    found = {step_of(path): path for path in reversed(list_checkpoints(folder / "checkpoints"))}
    wanted = max(found, default=0) if step is None else step
    return wanted == 0 and 0 in found and DTYPES in CheckpointReader(found[0]).state


def _rectangle(model: HuggingFaceModel, piece: Piece, read: Counter[str]) -> Deferred:
    declared = torch.empty(piece.sizes, dtype=piece.dtype, device="meta")
    return Deferred(piece.stored, piece.shape, piece.offsets, declared, _reader(model, piece, read))


def _reader(model: HuggingFaceModel, piece: Piece, read: Counter[str]) -> Callable[[], Tensor]:
    def elements() -> Tensor:
        read[piece.theirs] += 1
        return model.read(piece)

    return elements


def _run_config(model: HuggingFaceModel, target: Path) -> LoadedConfig:
    tokenizer = target / KEPT / TOKENIZER if (model.folder / TOKENIZER).is_file() else None
    values = {
        "run": {"name": target.name, "folder": str(target.parent)},
        "model": model.model.model_dump(mode="json"),
        "data": {
            "tokenizer": str(tokenizer) if tokenizer is not None else None,
            "sequence_length": min(model.context or LONGEST, LONGEST),
        },
    }
    try:
        return validate(Tree(values), str(target))
    except InputError as error:
        raise InputError(str(target), f"cannot become a run: {error}", "choose another name for the run folder") from error
