"""The rotary part of config.json. Two spellings: rope_theta with rope_scaling, and rope_parameters (transformers 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megascale.config.errors import InputError
from megascale.config.schema import Rotary

_KEYS = {
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
"""Key of config.json -> field of `Rotary`, by kind of scaling."""


def read_rotary(values: Mapping[str, Any], theta: float, place: str) -> dict[str, Any]:
    """The values of `Rotary`.

    Args:
        values: config.json.
        theta: of the family, where config.json names none.

    Raises:
        InputError: a kind of scaling or a setting of it that is not supported.
    """
    scaling = {**(values.get("rope_parameters") or {}), **(values.get("rope_scaling") or {})}
    base = scaling.pop("rope_theta", values.get("rope_theta"))
    partial = scaling.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
    kind, older = scaling.pop("rope_type", None), scaling.pop("type", None)
    kind = kind or older or "default"
    if partial not in (None, 1):
        raise InputError(place, f"partial_rotary_factor {partial} is not supported", "megascale rotates whole heads")
    found: dict[str, Any] = {"theta": float(base if base is not None else theta)}
    if kind == "default":
        _refuse_rest(scaling, kind, place)
        return found
    if kind not in _KEYS:
        raise InputError(place, f"rope type {kind!r} is not supported", "supported: default, llama3, yarn")
    found["scaling"] = kind
    scaling.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    for key, name in _KEYS[kind].items():
        value = scaling.pop(key, None)
        if value is None and key.startswith("beta_"):
            continue  # the paper's, which are ours too
        if value is None:
            raise InputError(place, f"rope type {kind} lacks {key}", "is config.json complete?")
        found[name] = int(value) if name == "original_context" else float(value)
    if kind == "yarn":
        _check_yarn(scaling, found["factor"], place)
    _refuse_rest(scaling, kind, place)
    return found


def _check_yarn(scaling: dict[str, Any], factor: float, place: str) -> None:
    """What transformers lets vary and we do not: the factor on cos and sin, and rounding of the passage."""
    attention, truncate = scaling.pop("attention_factor", None), scaling.pop("truncate", True)
    ours = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if attention is not None and not math.isclose(attention, ours, rel_tol=1e-6):
        raise InputError(place, f"yarn's attention_factor {attention} is not supported", f"megascale computes {ours:.6g}")
    if truncate is not True:
        raise InputError(place, f"yarn's truncate {truncate!r} is not supported", "megascale computes truncate true")


def _refuse_rest(scaling: Mapping[str, Any], kind: str, place: str) -> None:
    rest = [key for key, value in scaling.items() if value is not None]
    if rest:
        raise InputError(place, f"rope type {kind} has {', '.join(rest)}: not supported", "delete it if it has no effect")


def write_rotary(rotary: Rotary) -> dict[str, Any]:
    """rope_theta and rope_scaling, which every version of transformers reads."""
    if rotary.scaling == "none":
        return {"rope_theta": rotary.theta, "rope_scaling": None}
    settings = {key: getattr(rotary, name) for key, name in _KEYS[rotary.scaling].items()}
    return {"rope_theta": rotary.theta, "rope_scaling": {"rope_type": rotary.scaling, **settings}}
