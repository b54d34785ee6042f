"""The parts of a run are its steps as the trainer takes them, counted by streams and sequences."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megascale.config.phases import span_at
from megascale.config.schema import Config
from megascale.plan.parts import parts_of, run_tokens, steps_for
from megascale.train.schedule import sequences_at
from plans import P4, plan_of

LENGTH = 4096
PHASES = "schedule={phases: [{steps: 20, streams: 1, shape: constant}, {steps: 30}]}"
RAMP = "batch.ramp=[{steps: 5, sequences: 16}, {steps: 25, sequences: 32}]"


def config_of(folder: Path, *overrides: str) -> Config:
    return plan_of(folder, 1, *overrides, "parallel={}").config


def counted(config: Config, tokens: float | None = None) -> dict[tuple[int, int], float]:
    return {(part.config.model.streams.count, part.config.batch.sequences): part.steps for part in parts_of(config, tokens)}


@pytest.mark.parametrize("overrides", [(), (P4, PHASES), (RAMP,), (P4, PHASES, RAMP)])
def test_every_step_is_in_the_part_of_its_streams_and_sequences(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = config_of(tmp_path, *overrides)
    steps = range(1, config.schedule.steps + 1)
    expected = Counter((span_at(config, step).config.model.streams.count, sequences_at(step, config.batch)) for step in steps)
    assert counted(config) == counted(config, run_tokens(config)) == expected
    assert run_tokens(config) == LENGTH * sum(sequences_at(step, config.batch) for step in steps)


@pytest.mark.parametrize("tokens", [1e3, LENGTH * 80, LENGTH * 500, LENGTH * 880, 1e9])
def test_parts_of_given_tokens_train_on_them(tmp_path: Path, tokens: float) -> None:
    config = config_of(tmp_path, P4, PHASES, RAMP)
    found = counted(config, tokens)
    assert LENGTH * sum(sequences * steps for (_, sequences), steps in found.items()) == pytest.approx(tokens)
    assert sum(found.values()) == pytest.approx(steps_for(config, tokens))
    one_stream = sum(steps for (streams, _), steps in found.items() if streams == 1)
    assert one_stream == pytest.approx(0.4 * sum(found.values())), "phases keep their shares of the steps"


def test_rounding_makes_no_part(tmp_path: Path) -> None:
    config = config_of(tmp_path, "batch.ramp=[{steps: 7, sequences: 16}]", "schedule.steps=110")
    assert list(counted(config, LENGTH * 7 * 16)) == [(1, 16)]
