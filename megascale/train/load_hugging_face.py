"""A Hugging Face folder, opened for evaluation and generation as it is."""

from __future__ import annotations

from pathlib import Path

from megascale.checkpoint.hugging_face.folder import TOKENIZER, open_hugging_face
from megascale.checkpoint.hugging_face.read import HuggingFaceTensors
from megascale.checkpoint.weights import BUFFERS, WEIGHTS
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
    tensors = HuggingFaceTensors(source)
    decoder, world = decoder_of(source.model, lambda name: tensors.read(WEIGHTS + name), precision)
    buffers = {name: tensors.read(BUFFERS + name).to(world.device.torch) for name, _ in decoder.named_buffers()}
    decoder.load_state_dict(buffers, strict=False, assign=True)
    config = Config(model=source.model, data=Data(sequence_length=source.context or CONTEXT))
    tokenizer = folder / TOKENIZER
    return with_tokenizer(folder, config, decoder, world, tokenizer if tokenizer.is_file() else None, source.values)
