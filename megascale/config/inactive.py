"""Which settings have no effect because of what another setting says."""

from __future__ import annotations

from megascale.config.fields import KeyPath
from megascale.config.schema import AltUp, Config, Experts, Schedule, Start, Streams

LLAMA3_ONLY = ("low_frequency_factor", "high_frequency_factor")
YARN_ONLY = ("beta_fast", "beta_slow")
ROUTER_ONLY: dict[str, tuple[str, ...]] = {
    "balance_loss": ("softmax", "sigmoid", "rl_r"),
    "z_loss": ("softmax", "s_base", "rl_r"),
    "bias_rate": ("sigmoid",),
    "sinkhorn_iterations": ("s_base",),
    "sinkhorn_tolerance": ("s_base",),
    "gate": ("s_base",),
    "policy_loss": ("rl_r",),
    "baseline_loss": ("rl_r",),
    "entropy_bonus": ("rl_r",),
    "hash_map": ("hash",),
}
"""Settings of model.experts that only some routers read."""
SCALING = ("factor", "original_context", *LLAMA3_ONLY, *YARN_ONLY)


def inactive(config: Config) -> dict[KeyPath, str]:
    """The settings without effect, each with the setting that makes it so (``model.experts.count is 1``)."""
    return {**_model(config), **_optimizer(config), **_rest(config)}


def _model(config: Config) -> dict[KeyPath, str]:
    model, found = config.model, dict[KeyPath, str]()
    if model.streams.count == 1:
        found |= _all_but(("model", "streams"), Streams, "count", "model.streams.count is 1")
    if model.experts.count == 1:
        found |= _all_but(("model", "experts"), Experts, "count", "model.experts.count is 1")
    else:
        found |= _router(model.experts)
    found |= _altup(model.altup)
    unused = {"none": SCALING, "llama3": YARN_ONLY, "yarn": LLAMA3_ONLY}[model.rotary.scaling]
    return found | {("model", "rotary", name): f"model.rotary.scaling is {model.rotary.scaling}" for name in unused}


def _altup(altup: AltUp) -> dict[KeyPath, str]:
    path = ("model", "altup")
    if altup.form == "sequence":
        return {(*path, name): "model.altup.form is sequence" for name in ("read", "select", "coefficients")}
    if altup.blocks == 1:
        return _all_but(path, AltUp, "blocks", "model.altup.blocks is 1")
    return {(*path, "stride"): f"model.altup.form is {altup.form}"}


def _router(experts: Experts) -> dict[KeyPath, str]:
    reason = f"model.experts.router is {experts.router}"
    found: dict[KeyPath, str] = {
        ("model", "experts", name): reason for name, routers in ROUTER_ONLY.items() if experts.router not in routers
    }
    if experts.router == "hash" and experts.capacity_factor is None:
        found["model", "experts", "scope"] = f"{reason}, and nothing is dropped"
    return found


def _optimizer(config: Config) -> dict[KeyPath, str]:
    found: dict[KeyPath, str] = {}
    if config.optimizer.name != "muon":
        found["optimizer", "muon"] = f"optimizer.name is {config.optimizer.name}"
    for index, group in enumerate(config.optimizer.groups):
        if group.frozen:
            for name in ("lr_scale", "weight_decay"):
                found["optimizer", "groups", index, name] = "the group is frozen"
    return found


def _rest(config: Config) -> dict[KeyPath, str]:
    found: dict[KeyPath, str] = {}
    if config.start.model is None:
        found |= _all_but(("start",), Start, "model", "start.model is null")
    if config.schedule.phases:
        found |= {("schedule", n): "schedule.phases has its own" for n in Schedule.model_fields if n != "phases"}
    for index, phase in enumerate(config.schedule.phases):
        if phase.shape != "wsd":
            found["schedule", "phases", index, "decay_steps"] = f"its shape is {phase.shape}"
        if phase.shape == "constant":
            found["schedule", "phases", index, "final_lr"] = "its shape is constant"
        if index == 0:
            for name in ("new_warmup_steps", "reset_optimizer"):
                found["schedule", "phases", 0, name] = "the first phase has nothing before it"
    if config.schedule.shape != "wsd":
        found["schedule", "decay_steps"] = f"schedule.shape is {config.schedule.shape}"
    if config.schedule.shape == "constant":
        found["schedule", "final_lr"] = "schedule.shape is constant"
    if config.validation.every == 0:
        found["validation", "sequences"] = "validation.every is 0"
    if config.checkpoint.every == 0:
        for name in ("background", "keep_last", "keep_every"):
            found["checkpoint", name] = "checkpoint.every is 0"
    if config.parallel.pp == 1:
        found["parallel", "schedule"] = found["parallel", "virtual_stages"] = "parallel.pp is 1"
    elif config.parallel.schedule not in ("interleaved", "zero_bubble"):
        found["parallel", "virtual_stages"] = f"parallel.schedule is {config.parallel.schedule}"
    if config.parallel.cp == 1:
        found["parallel", "context"] = "parallel.cp is 1"
    if config.parallel.zero_stage == 0:
        found["engine", "deepspeed"] = "parallel.zero_stage is 0"
    if config.profile.steps is None:
        found["profile", "memory"] = "profile.steps is null"
    return found


def _all_but(path: KeyPath, section: type[Streams | Experts | AltUp | Start], switch: str, reason: str) -> dict[KeyPath, str]:
    return {path + (name,): reason for name in section.model_fields if name != switch}
