"""The learning rate and the batch of a step, as pure functions."""

from __future__ import annotations

import math

from megascale.config.schema import Batch, Schedule


def lr_scale(step: int, schedule: Schedule) -> float:
    """Share of the peak learning rate for optimizer step 1, 2, ..., `schedule.steps`.

    Warm-up is linear; cosine falls to `final_lr` at the last step (arXiv 1608.03983); wsd falls linearly over the last
    `decay_steps` (warm-up, stable, decay: arXiv 2404.06395).
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.shape == "constant":
        return 1.0
    last = schedule.steps
    if schedule.shape == "cosine":
        done = (step - schedule.warmup_steps) / max(last - schedule.warmup_steps, 1)
        return schedule.final_lr + (1 - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    assert schedule.decay_steps is not None
    done = max(step - (last - schedule.decay_steps), 0) / schedule.decay_steps
    return 1 - (1 - schedule.final_lr) * min(done, 1.0)


def sequences_at(step: int, batch: Batch) -> int:
    """Sequences in the global batch of optimizer step 1, 2, ...."""
    passed = 0
    for stage in batch.ramp:
        passed += stage.steps
        if step <= passed:
            return stage.sequences
    return batch.sequences


def consumed_before(step: int, batch: Batch) -> int:
    """Sequences consumed by all steps before `step`."""
    passed = total = 0
    for stage in batch.ramp:
        inside = max(min(step - 1 - passed, stage.steps), 0)
        passed, total = passed + stage.steps, total + inside * stage.sequences
    return total + max(step - 1 - passed, 0) * batch.sequences
