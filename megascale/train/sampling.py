"""Continuing a text with a key/value cache. B samples of one prompt, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale.config.errors import InputError
from megascale.model.initialize import generator
from megascale.parallel.pipeline import Stages


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen.

    Attributes:
        tokens: most tokens generated for a sample.
        temperature: divides the logits; 0: the likeliest token, always.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the smallest set of likeliest tokens whose probabilities, at this temperature, reach p.
        seed: of the choices; sample i of a seed is the same however many samples are drawn.
    """

    tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1

    def check(self) -> None:
        """Raises InputError for a value outside its range."""
        problems = (
            ("--tokens", self.tokens, self.tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (the likeliest token) or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
        )
        for name, value, good, remedy in problems:
            if not good:
                raise InputError(name, f"{value} is out of range", f"give {remedy}")


def choose(logits: Tensor, options: SamplingOptions, draw: float) -> int:
    """One token.

    Args:
        logits: [V].
        draw: uniform in [0, 1); where in the distribution of the candidates, likeliest first, the choice falls.
    """
    if options.temperature == 0:
        return int(logits.argmax())
    # stable: equal logits keep the order of their ids, so that top_k = 1 is the likeliest token as argmax finds it
    ordered, ids = logits.double().sort(descending=True, stable=True)
    probabilities = (ordered[: options.top_k] / options.temperature).softmax(0)
    before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities[: max(int((before < options.top_p).sum()), 1)]
    reached = probabilities.cumsum(0)
    place = int(torch.searchsorted(reached, draw * reached[-1], right=True))
    return int(ids[min(place, len(reached) - 1)])


def generate(
    stages: Stages, prompt: list[int], samples: int, context: int, stop: int | None, options: SamplingOptions
) -> Iterator[list[int | None]]:
    """Continue a prompt several times at once, one token of every sample at a time.

    Past `context` tokens the window slides: the newer half of the text is computed anew as a text of its own, one prefill every
    context / 2 tokens. Rotary positions beyond those of training extrapolate badly, while sequences that start inside documents
    are what training is made of.

    Args:
        stages: the model; all its ranks call this together, and each gets all samples. Data-parallel ranks share the samples, and so do
            tensor-parallel ones between their split matrices.
        prompt: ids, 1 to `context` of them.
        samples: B.
        context: most tokens the model sees, the length of its training sequences.
        stop: the token that ends a sample.

    Yields:
        The next token of each sample; None once it has ended. Ends after `options.tokens`, or when all samples have.
    """
    assert 0 < len(prompt) <= context
    mesh, device = stages.mesh, stages.mesh.world.device.torch
    readers, tensor = mesh.along("dp"), mesh.size("tp")
    # as many on every rank: the last ones may be more than were asked for
    each = -(-samples // (len(readers) * tensor)) * tensor
    mine = range(each * readers.index(mesh.world.rank), each * (readers.index(mesh.world.rank) + 1))
    caches = {stage: part.cache(each, min(context, len(prompt) + options.tokens)) for stage, part in stages.decoders.items()}
    text = torch.tensor(prompt).repeat(each, 1)
    new, ended, length = text, [False] * samples, 0
    for position in range(options.tokens):
        if length == context:
            length, new = 0, text[:, -max(context // 2, 1) :]
            for cache in caches.values():
                cache.length = 0
        logits, length = stages.decode(new.to(device), caches), length + new.shape[1]
        here = None
        if logits is not None and mesh.place["tp"] == 0:
            rows = zip(mine, logits.cpu(), strict=True)
            here = [choose(row, options, _draw(options.seed, i, position)) for i, row in rows]
        chosen = [token for part in mesh.world.gather(here) if part is not None for token in part]
        ended = [was or token == stop for was, token in zip(ended, chosen, strict=False)]
        yield [None if over else token for over, token in zip(ended, chosen, strict=False)]
        if all(ended):
            return
        new = torch.tensor(chosen[mine.start : mine.stop])[:, None]
        text = torch.cat([text[:, -context:], new], 1)


def _draw(seed: int, sample: int, position: int) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator(seed, "generate", sample, position)))
