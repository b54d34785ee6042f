"""A dense model's weights as an expert model's: every expert starts as a copy of its layer's feed-forward (arXiv 2212.05055).

With gates that sum to 1 the copies together are the dense feed-forward, so the first loss is the dense model's. E experts, f hidden width.
"""

from __future__ import annotations

import re

from megascale.config.errors import InputError
from megascale.config.schema import Experts, Model
from megascale.model.decoder import is_routed

EXPERT = re.compile(r"layers\.(\d+)\.feed_forward\.(gate|up|down)")
SHARED = re.compile(r"layers\.(\d+)\.feed_forward\.shared\.(gate|up|down)\.weight")
ROUTER = re.compile(r"layers\.(\d+)\.feed_forward\.router\.\w+")


def check_upcycling(dense: Model, model: Model) -> None:
    """Refuse experts that cannot start from a dense feed-forward. Both configs are resolved.

    Raises:
        InputError: the dense model has experts, the other has none, or experts are not as wide as the dense feed-forward.
    """
    if dense.experts.count > 1:
        raise InputError("model.experts", "the checkpoint has experts already", "upcycle a dense one")
    if model.experts.count == 1:
        raise InputError("model.experts.count", "is 1: the model has no experts to fill", "set it to the number of experts")
    if model.experts.width != dense.ffn_width:
        reason = f"{model.experts.width} is not the dense model's ffn_width {dense.ffn_width}, of which the experts are copies"
        raise InputError("model.experts.width", reason, f"set it to {dense.ffn_width}, or leave it out")


def starts_as_dense(experts: Experts) -> bool:
    """Whether the first loss of the upcycled model is the dense one's: gates sum to 1, and nothing is dropped."""
    gates_sum_to_one = experts.per_token > 1 or experts.router in ("rl_r", "hash")
    return gates_sum_to_one and experts.capacity_factor is None


def dense_name(name: str, model: Model) -> str | None:
    """The dense model's parameter that one of the expert model is, or of which each of its E experts [E, ...] is a copy.

    Args:
        name: of the parameter or buffer in the expert model.
        model: the expert model's config.

    Returns:
        None for what is new: routers and shared experts.
    """
    if ROUTER.fullmatch(name) or SHARED.fullmatch(name):
        return None
    expert = EXPERT.fullmatch(name)
    return f"{name}.weight" if expert and is_routed(int(expert[1]), model) else name


def starts_at_zero(name: str) -> bool:
    """Whether a new parameter starts at 0: the way back of shared experts, which then add nothing."""
    shared = SHARED.fullmatch(name)
    return shared is not None and shared[2] == "down"
