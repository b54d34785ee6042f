"""A dense model's weights as an expert model's: every expert starts as a copy of its layer's feed-forward (arXiv 2212.05055).

With gates that sum to 1 the copies together are the dense feed-forward, so the first loss is the dense model's. E experts, f hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from megascale.config.errors import InputError
from megascale.config.schema import Experts, Model
from megascale.model.decoder import is_routed

EXPERT = re.compile(r"layers\.(\d+)\.feed_forward\.(gate|up|down)")
SHARED = re.compile(r"layers\.(\d+)\.feed_forward\.shared\.(gate|up|down)\.weight")
ROUTER = re.compile(r"layers\.(\d+)\.feed_forward\.router\.\w+")


def check_upcycling(dense: Model, model: Model) -> None:
    """Refuse an expert model that cannot start from a dense one. Both configs are resolved.

    Raises:
        InputError: the dense model has experts, the other has none, experts are not as wide as the dense feed-forward, or anything else
            but the experts differs.
    """
    if dense.experts.count > 1:
        raise InputError("model.experts", "the checkpoint has experts already", "upcycle a dense one")
    if model.experts.count == 1:
        raise InputError("model.experts.count", "is 1: the model has no experts to fill", "set it to the number of experts")
    if model.experts.width != dense.ffn_width:
        reason = f"{model.experts.width} is not the dense model's ffn_width {dense.ffn_width}, of which the experts are copies"
        raise InputError("model.experts.width", reason, f"set it to {dense.ffn_width}, or leave it out")
    for name in type(model).model_fields:
        if name != "experts" and getattr(model, name) != getattr(dense, name):
            reason = f"{getattr(model, name)} is not the dense model's {getattr(dense, name)}"
            raise InputError(f"model.{name}", reason, "upcycling adds experts and changes nothing else")


def starts_as_dense(experts: Experts) -> bool:
    """Whether the first loss of the upcycled model is the dense one's: gates sum to 1, and nothing is dropped."""
    gates_sum_to_one = experts.per_token > 1 or experts.router in ("rl_r", "hash")
    return gates_sum_to_one and experts.capacity_factor is None


def upcycled(name: str, model: Model, read: Callable[[str], Tensor]) -> Tensor | None:
    """The start of one parameter of the expert model.

    Args:
        name: of the parameter in the expert model.
        model: the expert model's config.
        read: gives the dense model's parameters by name; called at most once.

    Returns:
        The dense weight, for experts E copies of it as a view [E, ...] that takes no more memory; zeros for the way back of shared
        experts, which then add nothing; none for what is new and starts as in a new model (routers, the way into shared experts).
    """
    if ROUTER.fullmatch(name):
        return None
    if shared := SHARED.fullmatch(name):
        if shared[2] != "down":
            return None
        assert model.experts.width is not None
        return torch.zeros(model.width, model.experts.shared * model.experts.width)
    expert = EXPERT.fullmatch(name)
    if expert and is_routed(int(expert[1]), model):
        dense = read(f"{name}.weight")
        return dense.expand(model.experts.count, *dense.shape)
    return read(name)
