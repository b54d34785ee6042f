"""Tiny models and packed batches for the tests of model, training and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale.config.resolve import resolve
from megascale.config.schema import AltUp, Config, Experts, Model, Rotary, Streams
from megascale.model.decoder import Decoder, Losses
from megascale.model.exchange import identity
from megascale.model.initialize import initialize
from megascale.model.origin import Draw, Origin, origin_of

IGNORED = -100


def tiny_model(**settings: Any) -> Model:
    """A resolved config of 2 layers, width 32, 97 ids; settings replace fields, sections as dicts."""
    sections = {"streams": Streams, "experts": Experts, "altup": AltUp, "rotary": Rotary}
    built = {name: sections[name](**value) if name in sections else value for name, value in settings.items()}
    model = Model(**{"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 64, **built})
    return resolve(Config(model=model)).model


def tiny_decoder(model: Model, seed: int = 0, spread: float = 0.0) -> Decoder:
    """A decoder with its initial weights; `spread` > 0 adds noise to every weight, so that nothing stays at a neutral start."""
    decoder = Decoder(model)
    initialize(decoder, model, seed)
    if spread:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return decoder


@dataclass(frozen=True)
class Batch:
    """tokens, positions, documents, labels, each [B, S]."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    labels: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the forward pass takes."""
        return self.tokens, self.positions, self.documents

    def losses(self, decoder: Decoder, scale: float | None = None) -> Losses:
        """The decoder's losses; by default each token weighs one over the number of labels."""
        count = int((self.labels != IGNORED).sum())
        return decoder.losses(*self.inputs, self.labels, torch.tensor(scale or 1 / count))


def packed_batch(lengths: Sequence[Sequence[int]], vocab_size: int = 97, seed: int = 0) -> Batch:
    """Random texts made of documents of the given lengths (the same sum for each text); each document's last token has no label."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), sum(lengths[0]))
    tokens, labels = (torch.randint(vocab_size, size, generator=generator) for _ in range(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in text]) for text in lengths])
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(text)), torch.tensor(text)) for text in lengths])
    ends = torch.stack([torch.tensor(text).cumsum(0).eq(torch.arange(1, size[1] + 1)[:, None]).any(1) for text in lengths])
    return Batch(tokens, positions, documents, labels.masked_fill(ends, IGNORED))


def origin(tokens: int, seed: int = 0, step: int = 0, layer: int = 0, vocab_size: int = 97) -> Origin:
    """The origin of some tokens with random ids, all of one sequence."""
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(3))
    return origin_of(ids, Draw(seed, step), identity).at(layer)


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Gradients by name, as copies; zeros where none arose."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in decoder.named_parameters()}


def largest_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|, in fp64; 0 for equal tensors."""
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / max(expected.double().abs().max().item(), 1e-30) if difference else 0.0
