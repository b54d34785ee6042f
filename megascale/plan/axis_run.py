"""A run of a design that the search over axes has found: a config to plan a layout for, to edit, and to start."""

from __future__ import annotations

import math
from difflib import get_close_matches

from megascale.config.errors import InputError
from megascale.config.schema import Batch, Config, Data, Phase, Run, Schedule
from megascale.config.write import dump
from megascale.plan.axis_search import AxisSearch

MOST_STEP_TOKENS = 2**22
"""4 M, what Llama 3 405B starts with (arXiv 2407.21783, section 3.4.1)"""
LEAST_STEPS = 5000
"""smaller budgets get smaller batches"""
_WARMUP = 0.02
_HEADER = """\
# {name}: {score}
# The search has chosen the model and the number of tokens, {tokens:.4g}. Batch, learning rates and corpora are for you to choose.
# Its layout: megascale plan --config THIS_FILE --cluster NAME --gpus N --write RUN.yaml --slurm JOB.sbatch
"""


def axis_run(found: AxisSearch, design: str | None = None) -> str:
    """The run of a design as YAML text that `load_config` reads.

    Args:
        design: its name as the report has it, "3072x24 P1 E8 k2 K1"; none: that of the best score.

    Raises:
        InputError: no design that keeps the limits has this name.
    """
    index = _index_of(found, design)
    one, tokens = found.table.models[index], float(found.tokens[index])
    batch = Batch(sequences=_sequences(tokens, found.work.sequence))
    steps = math.ceil(tokens / (batch.sequences * found.work.sequence))
    config = Config(
        run=Run(name=one.name.replace(" ", "-")),
        model=one.model,
        data=Data(sequence_length=found.work.sequence),
        batch=batch,
        schedule=_schedule(steps, one.model.streams.count, found.axes.stream_share),
        precision="bf16",
    )
    score = f"score {found.score[index]:.3g} of {found.flops:.4g} training FLOPs (megascale plan axes)"
    return _HEADER.format(name=one.name, score=score, tokens=tokens) + dump(config)


def _index_of(found: AxisSearch, design: str | None) -> int:
    best = found.best()
    assert best is not None, "a search without a design that fits is refused"
    if design is None:
        return best
    known = {model.name: index for index, model in enumerate(found.table.models) if found.fits[index]}
    if design not in known:
        near = get_close_matches(design, known, 3, 0.0)
        raise InputError("--design", f"{design!r} is no design within the limits", f"near it: {', '.join(near)}")
    return known[design]


def _sequences(tokens: float, length: int) -> int:
    """Of a step: a power of two, at most `MOST_STEP_TOKENS` and so few that there are `LEAST_STEPS` steps."""
    most = min(MOST_STEP_TOKENS, tokens / LEAST_STEPS) / length
    return 2 ** max(math.floor(math.log2(most)), 0)


def _schedule(steps: int, streams: int, share: float) -> Schedule:
    warmup = min(math.ceil(steps * _WARMUP), steps - 1)
    if streams == 1 or share == 1:
        return Schedule(steps=steps, warmup_steps=warmup)
    last = min(max(round(steps * share), 1), steps - 1)
    phases = (Phase(steps=steps - last, streams=1, shape="constant", warmup_steps=min(warmup, steps - last)), Phase(steps=last))
    return Schedule(phases=phases)
