"""Contradictory, unused and impossible settings: every check of more than one setting that needs no device."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from megascale.config.engine import engine_problems
from megascale.config.fields import KeyPath, dotted
from megascale.config.inactive import inactive
from megascale.config.layout_checks import contradictions, layout_problems, layout_remedy, layout_warnings
from megascale.config.load import LoadedConfig
from megascale.config.origin import REMEDY, Problem, raise_problems
from megascale.config.resolve import resolve, uneven_heads
from megascale.config.schema import Config, Phase, Schedule
from megascale.config.size import expert_row_unit, size_problems


def check(loaded: LoadedConfig, world: int | None = None) -> list[str]:
    """Refuse settings that contradict each other, have no effect although they were set, or can fit no machine.

    Args:
        loaded: a config with the places of its settings.
        world: number of ranks; none = only what does not depend on it.

    Returns:
        Warnings: settings that are allowed but have no effect here, or an unexpected one.

    Raises:
        InputError: lists every problem with its place.
    """
    config = loaded.config
    unused = list(_unused(loaded))
    # an override that switches a part off leaves the file's settings of that part behind: worth a word, not a refusal
    left_behind = [problem for problem in unused if _switched_off_by_override(problem, loaded)]
    problems = [
        *(problem for problem in unused if problem not in left_behind),
        *_attention(config),
        *_rotary(config),
        *_experts(config),
        *_altup(config),
    ]
    problems += [*_optimizer(config), *_schedule(config), *_profile(config), *_data(config)]
    wrong_layout = list(layout_problems(config, world))
    problems += [*wrong_layout, *contradictions(config), *engine_problems(config, world)]
    if not any(problem.path[0] == "model" for problem in problems):
        problems += size_problems(resolve(config))
    remedy = layout_remedy(config, world) if wrong_layout and world is not None else REMEDY
    raise_problems([_at_culprit(problem, loaded) for problem in problems], loaded.origin, loaded.file, remedy)
    warnings = [*((problem.path, problem.reason) for problem in left_behind), *_warnings(config), *layout_warnings(config)]
    return [f"{loaded.place(*path)}: {dotted(path)}: {reason}" for path, reason in warnings]


def _at_culprit(problem: Problem, loaded: LoadedConfig) -> Problem:
    """The problem at the first of its settings that was set: the others are defaults, which nobody wrote."""
    candidates = (problem.path, *problem.others)
    chosen = next((path for path in candidates if loaded.is_set(*path)), problem.path)
    return Problem(chosen, problem.reason)


def _unused(loaded: LoadedConfig) -> Iterator[Problem]:
    for path, reason in inactive(loaded.config).items():
        # Null, or an empty mapping, is how an override takes a setting back.
        if loaded.is_set(*path) and _value(loaded.config, path) not in (None, {}):
            back = f"{dotted(path[:-1])}={{}}" if path[0] in ("model", "engine") else None
            override = f" (an override {back} takes back the whole section)" if back else ""
            yield Problem(path, f"has no effect: {reason}; remove it{override}")


def _switched_off_by_override(problem: Problem, loaded: LoadedConfig) -> bool:
    """Whether an unused setting stands in a file while an override set something in the same section."""
    section = problem.path[:-1]
    overridden = {path for path, origin in loaded.origin.items() if origin.line is None}
    return problem.path not in overridden and any(path[: len(section)] == section for path in overridden)


def _value(config: Config, path: KeyPath) -> object:
    current: object = config
    for key in path:
        current = current[key] if isinstance(key, int) and isinstance(current, tuple) else getattr(current, str(key))
    return current


def _attention(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.kv_heads and model.heads % model.kv_heads:
        reason = f"heads {model.heads} is not a multiple of kv_heads {model.kv_heads}: {_divisors(model.heads)} are possible"
        yield Problem(("model", "kv_heads"), reason)
    if model.head_dim is None and model.width % model.heads:
        reason = f"{uneven_heads(model)}; or set model.head_dim"
        yield Problem(("model", "heads"), reason, (("model", "width"),))
    elif model.head_dim is not None and model.head_dim % 2:
        yield Problem(("model", "head_dim"), f"{model.head_dim} is odd; rotary embeddings turn pairs, so it must be even")
    elif model.head_dim is None and model.width // model.heads % 2:
        reason = f"width {model.width} / heads {model.heads} = {model.width // model.heads} per head is odd; must be even"
        yield Problem(("model", "heads"), f"{reason} for rotary embeddings", (("model", "width"),))


def _divisors(number: int) -> str:
    found = [str(divisor) for divisor in range(1, min(number, 1024) + 1) if number % divisor == 0]
    return ", ".join(found)


def _rotary(config: Config) -> Iterator[Problem]:
    rotary, path = config.model.rotary, ("model", "rotary")
    if rotary.scaling == "llama3" and rotary.low_frequency_factor >= rotary.high_frequency_factor:
        reason = f"low_frequency_factor {rotary.low_frequency_factor} must be below high_frequency_factor"
        others = ((*path, "high_frequency_factor"),)
        yield Problem((*path, "low_frequency_factor"), f"{reason} {rotary.high_frequency_factor}", others)
    if rotary.scaling == "yarn" and rotary.beta_slow >= rotary.beta_fast:
        reason = f"beta_slow {rotary.beta_slow} must be below beta_fast {rotary.beta_fast}"
        yield Problem((*path, "beta_slow"), reason, ((*path, "beta_fast"),))


def _experts(config: Config) -> Iterator[Problem]:
    experts, path = config.model.experts, ("model", "experts")
    if experts.count == 1:
        return
    if experts.per_token > experts.count:
        reason = f"a token cannot go to {experts.per_token} of {experts.count} experts; at most {experts.count}"
        yield Problem((*path, "per_token"), reason, ((*path, "count"),))
    elif experts.router == "rl_r" and experts.per_token == experts.count:
        reason = f"rl_r sends each token to {experts.per_token} of {experts.count} experts: there is nothing to choose"
        yield Problem((*path, "per_token"), f"{reason}; at most {experts.count - 1}", ((*path, "count"), (*path, "router")))
    unit = expert_row_unit(config)
    width_path = (*path, "width") if experts.width else ("model", "ffn_width")
    for width, here in ((config.model.width, ("model", "width")), (experts.width or config.model.ffn_width, width_path)):
        if width and width % unit:
            reason = f"{width} is not a multiple of {unit}: rows of an expert's {config.precision} matrices must fill 16 bytes"
            yield Problem(here, f"{reason}; the next is {-(-width // unit) * unit}")
    others: tuple[KeyPath, ...] = ((*path, "every"), ("model", "layers"))
    if experts.offset >= config.model.layers:
        reason = f"the first routed layer {experts.offset} is beyond the {config.model.layers} layers (from 0): none is routed"
        yield Problem((*path, "offset"), reason, others)
    elif experts.offset >= experts.every:
        reason = f"offset {experts.offset} must be below every {experts.every}: layers offset, offset + every, ... are routed"
        yield Problem((*path, "offset"), reason, others)


def _altup(config: Config) -> Iterator[Problem]:
    model, altup, path = config.model, config.model.altup, ("model", "altup")
    if altup.form != "sequence":
        return
    if altup.blocks > 1:
        reason = f"sequence has one residual block, given {altup.blocks}; set model.altup.blocks=1, or form recycled or wide"
        yield Problem((*path, "form"), reason, ((*path, "blocks"),))
    if model.layers < 3:
        reason = f"sequence leaves the first and the last layer as they are, and there are {model.layers}; at least 3"
        yield Problem((*path, "form"), reason, (("model", "layers"),))
    if altup.stride >= config.data.sequence_length:
        reason = f"{altup.stride} keeps one token of a sequence; less than data.sequence_length {config.data.sequence_length}"
        yield Problem((*path, "stride"), reason, (("data", "sequence_length"), (*path, "form")))
    if model.experts.count > 1 and model.experts.router == "rl_r":
        reason = "sequence leaves out tokens, for whose loss rl_r's routers would get no reward; choose another router"
        yield Problem((*path, "form"), reason, (("model", "experts", "router"),))


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    for index, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            yield Problem(("optimizer", "betas", index), f"given {beta}; expected a number >= 0 and < 1")
    first: dict[str, int] = {}
    for index, group in enumerate(optimizer.groups):
        if group.pattern in first:
            reason = f"{group.pattern} is the pattern of group {first[group.pattern]} too, which wins; join the two groups"
            yield Problem(("optimizer", "groups", index, "pattern"), reason)
        first.setdefault(group.pattern, index)


def _schedule(config: Config) -> Iterator[Problem]:
    schedule = config.schedule
    if schedule.phases:
        for index, phase in enumerate(schedule.phases):
            yield from _stretch(phase, ("schedule", "phases", index))
        yield from _phases(config)
    else:
        yield from _stretch(schedule, ("schedule",))
    steps = _steps(config)
    ramp = sum(stage.steps for stage in config.batch.ramp)
    if ramp >= steps:
        reason = f"the stages of the ramp take {ramp} steps, and the run has {steps}: the full batch is never reached"
        yield Problem(("batch", "ramp"), f"{reason}; shorten the ramp", (("schedule", "steps"),))


def _stretch(schedule: Schedule | Phase, path: KeyPath) -> Iterator[Problem]:
    """A learning rate that does not fit its steps."""
    steps, warmup, decay = ((*path, name) for name in ("steps", "warmup_steps", "decay_steps"))
    if schedule.warmup_steps > schedule.steps:
        reason = f"warmup_steps {schedule.warmup_steps} is more than steps {schedule.steps}"
        yield Problem(warmup, f"{reason}; set {dotted(warmup)} to at most {schedule.steps}", (steps,))
    elif schedule.shape == "wsd":
        decay_steps = schedule.decay_steps or max(1, schedule.steps // 5)
        if schedule.warmup_steps + decay_steps > schedule.steps:
            reason = f"warmup_steps {schedule.warmup_steps} + decay_steps {decay_steps} = {schedule.warmup_steps + decay_steps}"
            yield Problem(decay, f"{reason} is more than steps {schedule.steps}; shorten one of them", (warmup, steps))


def _phases(config: Config) -> Iterator[Problem]:
    """Streams may be added once, from 1 to the model's, and stay."""
    model, before = config.model.streams.count, 1
    for index, phase in enumerate(config.schedule.phases):
        streams = phase.streams or model
        path: KeyPath = ("schedule", "phases", index, "streams")
        if streams not in (1, model):
            yield Problem(
                path, f"{streams} streams; a phase has 1 or model.streams.count ({model})", (("model", "streams", "count"),)
            )
        elif streams < before:
            yield Problem(path, f"{streams} after {before} streams: streams can be added, not removed")
        before = streams
    if before < model:
        reason = f"no phase trains the {model} streams of model.streams.count"
        yield Problem(("schedule", "phases"), f"{reason}; leave streams out of the last phase", (("model", "streams", "count"),))


def _steps(config: Config) -> int:
    return sum(phase.steps for phase in config.schedule.phases) or config.schedule.steps


def _profile(config: Config) -> Iterator[Problem]:
    if config.profile.steps is None:
        return
    first, last = config.profile.steps
    if not 1 <= first <= last:
        yield Problem(("profile", "steps"), f"given [{first}, {last}]; expected [first, last] with 1 <= first <= last")
    elif last > _steps(config):
        reason = f"step {last} is beyond the last step {_steps(config)}"
        yield Problem(("profile", "steps"), reason, (("schedule", "steps"),))


def _data(config: Config) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, source in enumerate(config.data.sources):
        path = os.path.normpath(source.path)
        if path in first:
            reason = f"{source.path} is source {first[path]} too; name it once, with the sum of the weights"
            yield Problem(("data", "sources", index, "path"), reason)
        first.setdefault(path, index)


def _warnings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    model, length = config.model, config.data.sequence_length
    if model.sliding_window is not None and model.sliding_window >= length:
        yield ("model", "sliding_window"), f"{model.sliding_window} has no effect: sequences have {length} tokens"
    if model.rotary.scaling != "none" and model.rotary.factor == 1:
        yield ("model", "rotary", "factor"), f"1 leaves the frequencies as they are; {model.rotary.scaling} has no effect"
    blocks, every = model.altup.blocks, model.experts.every
    shared = math.gcd(blocks, every)
    if model.experts.count > 1 and model.altup.select == "alternating" and shared > 1:
        reason = f"altup.blocks {blocks} and experts.every {every} share the factor {shared}: routed layers read only"
        turns = "; with model.altup.select=by_period they take turns"
        yield ("model", "experts", "every"), f"{reason} {blocks // shared} of the {blocks} blocks{turns}"
    if blocks > 1 and model.altup.select == "by_period" and every == 1:
        yield ("model", "altup", "select"), "by_period is alternating: model.experts.every is 1"
    checkpoint = config.checkpoint
    if checkpoint.every and checkpoint.keep_every % checkpoint.every:
        reason = f"{checkpoint.keep_every} is not a multiple of every {checkpoint.every}: only steps that are multiples of both"
        yield ("checkpoint", "keep_every"), f"{reason} are kept for good"
