"""The steps of a run that cost alike: its phases, cut where the batch grows; and the tokens of a run whose batch grows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megascale.config.phases import spans
from megascale.config.schema import Batch, Config
from megascale.train.schedule import consumed_before

_ROUNDING = 1e-9
"""of the run's steps: fewer are no part, but what rounding leaves of one"""


@dataclass(frozen=True)
class Part:
    """Steps with one number of streams and one batch.

    Attributes:
        steps: how many; a fraction where the tokens of the run ask for one.
        config: the run's, with these streams and this batch for all of its steps.
    """

    steps: float
    config: Config


def run_tokens(config: Config) -> int:
    """Training tokens of a resolved config, all phases and the ramp of the batch counted."""
    return consumed_before(config.schedule.steps + 1, config.batch) * config.data.sequence_length


def steps_for(config: Config, tokens: float) -> float:
    """Steps, with the ramp of the batch, that train on so many tokens; a fraction where the last step needs fewer."""
    left, passed = tokens / config.data.sequence_length, 0
    for stage in config.batch.ramp:
        if left <= stage.steps * stage.sequences:
            return passed + left / stage.sequences
        left -= stage.steps * stage.sequences
        passed += stage.steps
    return passed + left / config.batch.sequences


def parts_of(config: Config, tokens: float | None = None) -> tuple[Part, ...]:
    """The parts of a resolved run, those of its start first.

    Args:
        tokens: of the run, in place of its own steps: the phases are stretched, the ramp of the batch is not.
    """
    steps = float(config.schedule.steps)
    stretch = 1.0 if tokens is None else steps_for(config, tokens) / steps
    found: dict[tuple[int, int], Part] = {}
    for span in spans(config):
        for first, last, sequences in _batches(config.batch):
            count = min(last, span.last * stretch) - max(first, span.before * stretch)
            if count > _ROUNDING * stretch * steps:
                key = span.config.model.streams.count, sequences
                batch = Batch(sequences=sequences, micro_batches=config.batch.micro_batches)
                part = found.get(key) or Part(0, span.config.model_copy(update={"batch": batch}))
                found[key] = replace(part, steps=part.steps + count)
    return tuple(found.values())


def _batches(batch: Batch) -> Iterator[tuple[float, float, int]]:
    """Steps done before a batch comes, steps done behind its last, its sequences."""
    passed = 0
    for stage in batch.ramp:
        yield passed, passed + stage.steps, stage.sequences
        passed += stage.steps
    yield passed, math.inf, batch.sequences
