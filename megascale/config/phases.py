"""The phases of a run: stretches of steps with their own number of streams and their own learning rates (arXiv 2505.10475, section 4.1).

A run without `schedule.phases` has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config.schema import Config, Phase, Schedule


@dataclass(frozen=True)
class Span:
    """One phase.

    Attributes:
        number: 0 for the first.
        before: optimizer steps done before it.
        config: the run's, with this phase's streams, and with a schedule that counts its steps from 1.
        new_warmup_steps: steps over which the parameters warm up that this phase, or the run to the model it starts from, adds.
        reset_optimizer: whether moments and step counts start anew.
    """

    number: int
    before: int
    config: Config
    new_warmup_steps: int = 0
    reset_optimizer: bool = False

    @property
    def last(self) -> int:
        """The last step of the phase, counted from the start of the run."""
        return self.before + self.config.schedule.steps


def spans(config: Config) -> list[Span]:
    """The phases of a resolved config, in order."""
    if not config.schedule.phases:
        return [Span(0, 0, config, config.start.new_warmup_steps)]
    found: list[Span] = []
    for number, phase in enumerate(config.schedule.phases):
        before = found[-1].last if found else 0
        warmup = phase.new_warmup_steps if number else config.start.new_warmup_steps
        found.append(Span(number, before, _config(config, phase), warmup, phase.reset_optimizer))
    return found


def span_at(config: Config, step: int) -> Span:
    """The phase in which a step was trained; step 0 belongs to the first."""
    return next(span for span in spans(config) if step <= span.last)


def _config(config: Config, phase: Phase) -> Config:
    model, optimizer = config.model, config.optimizer
    streams = model.streams.model_copy(update={"count": phase.streams or model.streams.count})
    scaled: dict[str, object] = {"lr": optimizer.lr * phase.lr_scale}
    if optimizer.muon is not None:
        scaled["muon"] = optimizer.muon.model_copy(update={"lr": optimizer.muon.lr * phase.lr_scale})
    schedule = Schedule(
        steps=phase.steps,
        warmup_steps=phase.warmup_steps,
        shape=phase.shape,
        decay_steps=phase.decay_steps,
        final_lr=phase.final_lr,
    )
    return config.model_copy(
        update={
            "model": model.model_copy(update={"streams": streams}),
            "schedule": schedule,
            "optimizer": optimizer.model_copy(update=scaled),
        }
    )
