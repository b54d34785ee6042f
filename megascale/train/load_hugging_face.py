"""A Hugging Face folder, opened for evaluation and generation as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megascale.checkpoint.hugging_face.folder import TOKENIZER, HuggingFaceModel, open_hugging_face
from megascale.config.schema import Config, Data
from megascale.train.load_run import LoadedModel, Precision, decoder_of, with_tokenizer

CONTEXT = 2048
"""Tokens of context where config.json does not say."""


def load_hugging_face(folder: Path, precision: Precision) -> LoadedModel:
    """Open config.json, the safetensors files and tokenizer.json, if there is one; one tensor is read at a time.

    Raises:
        InputError: see `open_hugging_face` and `load_tokenizer`.
    """
    source = open_hugging_face(folder)
    read = _Reader(source)
    decoder, world = decoder_of(source.model, read, precision)
    buffers = {name: read(name).to(world.device.torch) for name, _ in decoder.named_buffers()}
    decoder.load_state_dict(buffers, strict=False, assign=True)
    config = Config(model=source.model, data=Data(sequence_length=source.context or CONTEXT))
    tokenizer = folder / TOKENIZER
    return with_tokenizer(folder, config, decoder, world, tokenizer if tokenizer.is_file() else None, source.values)


class _Reader:
    """Gives our tensors out of their pieces."""

    def __init__(self, source: HuggingFaceModel):
        self.source = source

    def __call__(self, name: str) -> Tensor:
        pieces = [piece for piece in self.source.pieces if piece.ours == name]
        if pieces[0].whole:
            return self.source.read(pieces[0])
        result = torch.empty(pieces[0].shape)
        for piece in pieces:
            result[piece.offsets[0] : piece.offsets[0] + piece.sizes[0]] = self.source.read(piece)
        return result
