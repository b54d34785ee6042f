"""A Hugging Face folder, opened for evaluation and generation as it is."""

from __future__ import annotations

from pathlib import Path

from megascale.checkpoint.hugging_face.folder import TOKENIZER, HuggingFaceModel, open_hugging_face
from megascale.checkpoint.hugging_face.read import HuggingFaceTensors
from megascale.config.schema import Config, Data
from megascale.train.load_run import LoadedModel, Precision, with_tokenizer
from megascale.train.team import Team, check_layout, open_stages

CONTEXT = 2048
"""Tokens of context where config.json does not say."""


def load_hugging_face(folder: Path, precision: Precision, team: Team, length: int | None) -> LoadedModel:
    """Open config.json, the safetensors files and tokenizer.json, if there is one; one tensor is read at a time.

    Raises:
        InputError: see `open_hugging_face` and `load_tokenizer`; or the layout does not fit the model.
    """

    def found() -> tuple[HuggingFaceModel, Config]:
        source = open_hugging_face(folder)
        config = Config(model=source.model, data=Data(sequence_length=source.context or CONTEXT))
        check_layout(config, team, length or config.data.sequence_length)
        return source, config

    source, config = team.together(found)
    stages = open_stages(config, HuggingFaceTensors(source), precision, team)
    tokenizer = folder / TOKENIZER if (folder / TOKENIZER).is_file() else None
    return team.together(lambda: with_tokenizer(folder, config, stages, tokenizer, source.values))
