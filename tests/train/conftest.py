"""A tiny trained run, shared by the tests of the verbs on runs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest
from megascale.train.main import train

CONFIG = """
run: {{name: tiny, folder: {folder}}}
model:
  width: 32
  layers: 2
  heads: 2
  streams: {{count: 2, prefix_tokens: 4}}
  experts: {{count: 4, per_token: 2, every: 2, offset: 1}}
data: {{sources: [{{path: {folder}/words}}], sequence_length: 32}}
batch: {{sequences: 4}}
schedule: {{steps: 4, warmup_steps: 1}}
compile: "off"
validation: {{every: 2, sequences: 4}}
checkpoint: {{every: 2}}
observe: {{wandb: {{mode: "off"}}}}
"""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps on a few texts, with checkpoints of steps 2 and 4; P = 2, E = 4, K = 1."""
    folder = tmp_path_factory.mktemp("verbs")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(30):
        words = [f"def {word}(self):\n    return {number}\n" for word in ("alpha", "beta", "gamma", "délta", "日本")]
        (texts / f"{number:02d}.txt").write_text("".join(words[: 1 + number % 5] * (1 + number % 3)), encoding="utf-8")
    prepare_corpus(folder / "words", PrepareRequest(source=SourceRequest(paths=(texts,)), vocab_size=300, validation=0.3))
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        assert train(folder / "tiny.yaml", []) == 0
    finally:
        for number, handler in handlers.items():  # a run takes the signals of its process
            signal.signal(number, handler)
    return folder / "tiny"
