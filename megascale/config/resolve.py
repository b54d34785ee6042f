"""Values that follow from other values, filled in once, so that no other room derives them again."""

from __future__ import annotations

from megascale.config.errors import InputError
from megascale.config.schema import Config, Experts, Model, Phase, Schedule

FFN_MULTIPLE = 64
DEFAULT_BALANCE_LOSS = {"softmax": 0.01, "rl_r": 0.01, "sigmoid": 0.0}
"""By router; the others have no balance loss."""


def resolve(config: Config) -> Config:
    """Fill in what was left to be derived.

    ``model.kv_heads`` = heads; ``model.head_dim`` = width / heads; ``model.ffn_width`` = 8/3 width rounded up to a
    multiple of 64; where there are experts, ``model.experts.width`` = ffn_width and ``model.experts.balance_loss`` = the
    router's default; ``schedule.decay_steps`` = a fifth of the steps, at least one, with the shape wsd. ``model.vocab_size``
    stays none until the data is opened, ``parallel.dp`` until the world is known. Resolving twice changes nothing.

    Raises:
        InputError: width is no multiple of heads and head_dim is not given.
    """
    return config.model_copy(update={"model": _model(config.model), "schedule": _schedule(config.schedule)})


def _model(model: Model) -> Model:
    if model.head_dim is None and model.width % model.heads:
        raise InputError("model.head_dim", uneven_heads(model), "change one of them, or set model.head_dim")
    ffn_width = feed_forward_width(model)
    return model.model_copy(
        update={
            "kv_heads": model.kv_heads or model.heads,
            "head_dim": model.head_dim or model.width // model.heads,
            "ffn_width": ffn_width,
            "experts": _experts(model.experts, ffn_width),
        }
    )


def feed_forward_width(model: Model) -> int:
    """model.ffn_width, or where it is none 8/3 width, rounded up to a multiple of 64."""
    return model.ffn_width or -(-8 * model.width // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


def uneven_heads(model: Model) -> str:
    """Says that the width cannot be cut into heads, with the widths that can."""
    below = model.width // model.heads * model.heads
    nearest = f"{below} or {below + model.heads}" if below else str(model.heads)
    return f"width {model.width} is not a multiple of heads {model.heads}; the nearest is {nearest}"


def _experts(experts: Experts, ffn_width: int) -> Experts:
    if experts.count == 1:
        return experts
    update: dict[str, object] = {"width": experts.width or ffn_width}
    if experts.balance_loss is None:
        update["balance_loss"] = DEFAULT_BALANCE_LOSS.get(experts.router)
    return experts.model_copy(update=update)


def _schedule(schedule: Schedule) -> Schedule:
    if schedule.phases:
        phases = tuple(phase.model_copy(update={"decay_steps": _decay_steps(phase)}) for phase in schedule.phases)
        return schedule.model_copy(update={"phases": phases, "steps": sum(phase.steps for phase in phases)})
    return schedule.model_copy(update={"decay_steps": _decay_steps(schedule)})


def _decay_steps(schedule: Schedule | Phase) -> int | None:
    return schedule.decay_steps or max(1, schedule.steps // 5) if schedule.shape == "wsd" else schedule.decay_steps
