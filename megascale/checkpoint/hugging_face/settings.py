"""config.json to a `Model` config and back. Nothing is guessed: a key that changes the maths and is not understood is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megascale.checkpoint.hugging_face.families import FAMILIES, MEGASCALE, NEUTRAL, Family
from megascale.checkpoint.hugging_face.rotary import read_rotary, write_rotary
from megascale.config.errors import InputError
from megascale.config.resolve import resolve
from megascale.config.schema import AltUp, Config, Experts, Model, Rotary, Streams

OWN_KEY = "megascale"
"""Where config.json of the megascale format holds the `Model` settings."""

_WINDOW_KEYS = {
    "never": (),
    "always": ("sliding_window", "layer_types"),
    "switched": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
_ROTARY_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_TRAINING_ONLY = (
    "balance_loss", "z_loss", "scope", "capacity_factor", "bias_rate", "sinkhorn_iterations", "sinkhorn_tolerance",
    "policy_loss", "baseline_loss", "entropy_bonus", "hash_map",
)  # fmt: skip
"""Settings of experts that no forward pass in evaluation sees (a hash router's table is saved)."""
COMPUTED = {
    "": (
        "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn_width", "norm_eps", "qkv_bias", "qk_norm",
        "sliding_window", "tie_embeddings", "init_std",
    ),
    "rotary": tuple(Rotary.model_fields),
    "streams": ("count", "prefix_tokens", "smoothing", "prefix_start", "reparameterise"),  # networks are folded before
    "altup": ("blocks", "form", "stride", "read", "select", "coefficients"),
    "experts": ("count", "per_token", "every", "offset", "width", "shared", "router", "gate", *_TRAINING_ONLY),
}  # fmt: skip
"""The `Model` settings by section that modeling_megascale.py computes, or need not."""


def family_of(values: Mapping[str, Any], place: str) -> Family:
    """The family that config.json names.

    Raises:
        InputError: none, or one that is not supported.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise InputError(place, f"model_type {name!r} is not supported", f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_model(values: Mapping[str, Any], place: str) -> Model:
    """The resolved `Model` config that config.json describes.

    Args:
        values: its content.
        place: its path, for messages.

    Raises:
        InputError: names the key that is missing, unknown, or has a value that we do not compute.
    """
    family = family_of(values, place)
    if family is MEGASCALE:
        return _read_own(values, place)
    _refuse_unknown(family, values, place)
    _check_fixed(family, values, place)
    found: dict[str, Any] = dict(family.constants)
    paths: dict[str, str] = {}  # where a setting came from, for messages
    for key, path in family.settings.items():
        if key == "num_experts" and key not in values:
            key = "num_local_experts"  # transformers 5 writes it under this name
        if key not in values and key not in family.defaults:
            raise InputError(place, f"lacks {key}", "is config.json complete?")
        value = values.get(key, family.defaults.get(key))
        if value is not None:
            _set(found, path, float(value) if path in _FLOATS and isinstance(value, int) else value)
            paths[path] = key
    _read_experts(family, values, found, place)
    found["sliding_window"] = _read_window(family, values, place)
    found["rotary"] = read_rotary(values, family.theta, place)
    if found.get("streams", {}).get("count") == 1:
        del found["streams"]  # the published P = 1 files keep the other two keys
    return _validated(found, paths, place)


_FLOATS = ("norm_eps", "init_std", "streams.smoothing")


def _read_own(values: Mapping[str, Any], place: str) -> Model:
    if not isinstance(values.get(OWN_KEY), dict):
        raise InputError(place, f"lacks the section {OWN_KEY}", "was it written by megascale convert?")
    return _validated(values[OWN_KEY], {}, place)


def _validated(found: Mapping[str, Any], paths: Mapping[str, str], place: str) -> Model:
    try:
        model = Model.model_validate_json(json.dumps(found))  # strict nodes take an integer for a float from JSON only
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise InputError(place, f"{paths.get(path, path)}: {first['msg']}, given {first['input']!r}", "is it damaged?") from error
    if model.head_dim is None and model.width % model.heads:
        reason = f"hidden_size {model.width} is not a multiple of num_attention_heads {model.heads}, and there is no head_dim"
        raise InputError(place, reason, "is it damaged?")
    return resolve(Config(model=model)).model


def _set(found: dict[str, Any], path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    (found.setdefault(section, {}) if section else found)[name] = value


def _get(model: Model, path: str) -> Any:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _refuse_unknown(family: Family, values: Mapping[str, Any], place: str) -> None:
    known = {*family.settings, *family.fixed, *family.other_keys, *NEUTRAL, *_ROTARY_KEYS, *_WINDOW_KEYS[family.window]}
    if family.custom_code:
        known.add("auto_map")
    unknown = [key for key in values if key not in known and values[key] is not None]
    if unknown:
        reason = f"{_listed(values, unknown)}: not a setting of {family.model_type} that megascale computes"
        raise InputError(place, reason, "if it does not change the model's output, delete it from a copy of config.json")


def _check_fixed(family: Family, values: Mapping[str, Any], place: str) -> None:
    for key, only in family.fixed.items():
        if values.get(key) not in (None, only):
            raise InputError(place, f"{key} {values[key]!r} is not supported", f"megascale computes {key} {only!r} only")


def _listed(values: Mapping[str, Any], keys: list[str]) -> str:
    shown = [f"{key} {values[key]!r}" if isinstance(values[key], (bool, int, float, str)) else key for key in keys]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _read_experts(family: Family, values: Mapping[str, Any], found: dict[str, Any], place: str) -> None:
    if "experts" not in found:
        return
    experts = found["experts"]
    renormalised = bool(values.get("norm_topk_prob", False)) if family.model_type == "qwen3_moe" else True
    if experts.get("count") == 1:
        raise InputError(place, "has 1 expert", "megascale has dense layers, or at least 2 experts")
    if renormalised != (experts.get("per_token") != 1):
        key = "norm_topk_prob" if family.model_type == "qwen3_moe" else "num_experts_per_tok"
        reason = f"{key} {values.get(key)!r} with {experts.get('per_token')} experts per token is not supported"
        raise InputError(place, reason, "gates are renormalised for k > 1, and are the probability itself for k = 1")
    if family.model_type == "qwen3_moe":
        experts["every"] = values.get("decoder_sparse_step", 1)
        experts["offset"] = experts["every"] - 1
        if values.get("num_experts", values.get("num_local_experts")) != values.get("num_local_experts", experts["count"]):
            raise InputError(place, "num_experts and num_local_experts differ", "delete the wrong one")


def _read_window(family: Family, values: Mapping[str, Any], place: str) -> int | None:
    """The sliding window of all layers; none where none has one."""
    if family.window == "never":
        return None
    window = values.get("sliding_window", family.defaults["sliding_window"])
    if family.window == "switched":
        layers, full = values["num_hidden_layers"], values.get("max_window_layers", family.defaults["max_window_layers"])
        if not values.get("use_sliding_window", False) or full >= layers:
            window = None
        elif full and window is not None and "layer_types" not in values:
            remedy = "megascale has a window in all layers or in none"
            raise InputError(place, f"max_window_layers {full}: {full} of {layers} layers have no window", remedy)
    kinds = set(values.get("layer_types") or ())
    if kinds - {"sliding_attention" if window is not None else "full_attention"}:
        reason = f"layer_types names {', '.join(sorted(kinds))}, the other settings a window of {window}"
        raise InputError(place, reason, "megascale has a window in all layers or in none")
    return window


def essential(model: Model) -> Model:
    """The model without what no forward pass in evaluation sees: settings of parts that are off, and of losses."""
    experts = model.experts.model_copy(update={name: Experts.model_fields[name].default for name in _TRAINING_ONLY})
    rotary = model.rotary
    update = {
        "streams": model.streams.model_copy(update={"prefix_start": "normal"}) if model.streams.count > 1 else Streams(),
        "altup": _essential_altup(model.altup),
        "experts": experts if experts.count > 1 else Experts(),
        "rotary": rotary if rotary.scaling != "none" else Rotary(theta=rotary.theta),
    }
    return resolve(Config(model=model.model_copy(update=update))).model


def _essential_altup(altup: AltUp) -> AltUp:
    if altup.form == "sequence":
        return AltUp(form="sequence", stride=altup.stride)
    return altup.model_copy(update={"stride": AltUp().stride}) if altup.blocks > 1 else AltUp()


def choose_family(model: Model, preferred: str | None) -> Family:
    """The family to export a model as: the preferred one if it can express the model, else the first that can.

    A family can express a model when what it writes reads back as the same model; the megascale format always can.
    """
    names = ([preferred] if preferred in FAMILIES else []) + list(FAMILIES)
    return next(FAMILIES[name] for name in names if name is not None and _expresses(FAMILIES[name], model))


def _expresses(family: Family, model: Model) -> bool:
    try:
        return essential(read_model(write_settings(family, model, {}), family.model_type)) == essential(model)
    except InputError:
        return False


def refuse_uncomputed(model: Model) -> None:
    """Refuse a model with a setting that modeling_megascale.py does not know.

    Raises:
        InputError: names the setting.
    """
    for section, known in COMPUTED.items():
        node = getattr(model, section) if section else model
        for name, info in type(node).model_fields.items():
            value = getattr(node, name)
            if name not in (*known, *COMPUTED) and value != info.get_default():
                path = ".".join(filter(None, ("model", section, name)))
                raise InputError(path, f"{value} cannot be exported yet", "transformers would compute another model")


def write_settings(family: Family, model: Model, neutral: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json; `neutral` gives values of keys that the model does not decide."""
    written: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    written |= {key: neutral[key] for key in NEUTRAL if key in neutral and key not in written}
    if family is MEGASCALE:
        return {**written, OWN_KEY: model.model_dump(mode="json")}
    model = essential(model)
    written |= family.fixed
    written |= {key: _get(model, path) for key, path in family.settings.items()}
    written |= dict(_window_settings(family, model))
    if "num_experts" in family.settings:
        written |= {"decoder_sparse_step": model.experts.every, "norm_topk_prob": model.experts.per_token > 1}
    if model.head_dim == model.width // model.heads and family.defaults["head_dim"] is None:
        del written["head_dim"]  # the class computes the same, and older ones do not know the key
    return {**written, **write_rotary(model.rotary)}


def _window_settings(family: Family, model: Model) -> Iterator[tuple[str, Any]]:
    if family.window != "never":
        yield "sliding_window", model.sliding_window
    if family.window == "switched":
        yield "use_sliding_window", model.sliding_window is not None
        yield "max_window_layers", 0 if model.sliding_window is not None else model.layers
