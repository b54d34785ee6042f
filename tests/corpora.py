"""A small prepared corpus of generated text."""

from __future__ import annotations

import random
from pathlib import Path

from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest

WORDS = ["the", "a", "one", "two", "red", "green", "small", "stream", "block", "expert"]
WORDS += ["learns", "reads", "writes", "holds", "and", "or", "but", "never", "always", ".", ",", ";", "\n"]
VOCABULARY = 300


def build_corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """Writes random sentences and prepares them: about 7000 tokens of 300 ids, a tenth of the documents held out."""
    generator = random.Random(seed)
    texts = folder.with_name(folder.name + "-texts")
    texts.mkdir(parents=True)
    for number in range(documents):
        words = generator.choices(WORDS, k=generator.randint(10, 150))
        (texts / f"{number:03d}.txt").write_text(f"{number} " + " ".join(words), encoding="utf-8")
    request = PrepareRequest(source=SourceRequest(paths=(texts,)), vocab_size=VOCABULARY, validation=0.1)
    prepare_corpus(folder, request)
    return folder
