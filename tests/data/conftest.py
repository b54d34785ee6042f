"""A small corpus for the tests of this room."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> Path:
    """Text files of different lengths made of a few words."""
    words = ["alpha", "beta", "gamma", "delta\n", "", "", "", "return", "épsilon", "12345", "==", "[x,", "y]\n\t日本", "zeta"]
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        text = " ".join(generator.choices(words, k=generator.randint(5, 300)))
        (folder / f"{number:03d}.txt").write_text(f"{number} {text}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="session")
def corpus_folder(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "small"
    prepare_corpus(folder, PrepareRequest(source=SourceRequest(paths=(texts,)), vocab_size=400, validation=0.2))
    return folder
