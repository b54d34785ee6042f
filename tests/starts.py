"""Models to start from, made by transformers, and tiny runs that start from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from corpora import VOCABULARY
from foreign import Case
from megascale.config.schema import Config
from megascale.data.open_data import open_source
from runs import tiny_config

FAMILIES = {"Llama": (), "Qwen2": ("model.qkv_bias=true",), "Qwen3": ("model.qk_norm=true",)}
"""Class of transformers -> what its model has that a tiny run has not."""
STREAMS = "model.streams={count: 2, prefix_tokens: 4}"
EXPERTS = "model.experts={count: 4, per_token: 2}"
BLOCKS = "model.altup={blocks: 2}"


def save_foreign(folder: Path, corpus: Path, family: str = "Qwen2", **config: object) -> nn.Module:
    """A tiny model of transformers with random weights and the corpus's tokenizer, in a folder."""
    model = Case(family, {"vocab_size": VOCABULARY, "eos_token_id": 0, **config}).save(folder)
    path = open_source(str(corpus), 0.0).tokenizer
    assert path is not None
    (folder / "tokenizer.json").write_bytes(Path(path).read_bytes())
    return model


def started(folder: Path, corpus: Path, source: Path, *overrides: str, family: str = "Qwen2") -> Config:
    """A tiny run that starts from such a model."""
    settings: Sequence[str] = ("optimizer={lr: 0.003, eps: 1e-5}", "schedule={steps: 3, warmup_steps: 0, shape: constant}")
    return tiny_config(folder, corpus, *settings, *FAMILIES[family], f"start.model={source}", *overrides)
