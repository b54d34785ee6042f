"""Rough sizes of a model, to refuse what no machine can hold. Exact figures: `megascale.model.accounting`."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.origin import Problem
from megascale.config.schema import Config, Model

MOST_PARAMETERS = 10**13
MOST_STATE_BYTES = 10**12
STATE_ELEMENT_BYTES = 4


def size_problems(config: Config) -> Iterator[Problem]:
    """Parameters, or a residual of one sequence, beyond any machine.

    Args:
        config: a resolved config.
    """
    yield from _too_many_parameters(config.model)
    yield from _too_long(config)


def expert_row_unit(config: Config) -> int:
    """Numbers in 16 bytes: what the rows of an expert's matrices must be multiples of for torch's grouped products."""
    return 8 if config.precision == "bf16" else 4


def routed_layers(model: Model) -> range:
    """The layers, from 0, whose feed-forward has experts."""
    experts = model.experts
    return range(experts.offset, model.layers, experts.every) if experts.count > 1 else range(0)


def strided_layers(model: Model) -> range:
    """The layers, from 0, that compute on every k-th token only (Sequence-AltUp): never the first and the last one."""
    return range(1, model.layers - 1) if model.altup.form == "sequence" else range(0)


def end_width(model: Model) -> int:
    """Width of the embedding, the last norm and the head: d, or K*d of AltUp's wide form."""
    return model.width * (model.altup.blocks if model.altup.form == "wide" else 1)


def _too_many_parameters(model: Model) -> Iterator[Problem]:
    assert model.kv_heads and model.head_dim and model.ffn_width, "resolve the config first"
    width, experts = model.width, model.experts
    attention = 2 * width * model.head_dim * (model.heads + model.kv_heads)
    dense = 3 * width * model.ffn_width
    routed_count = len(routed_layers(model))
    routed = 3 * width * (experts.width or 0) * (experts.count + experts.shared) + width * experts.count
    parts = {
        f"{model.layers} layers x {attention:.3g} attention (2 x width x head_dim x (heads + kv_heads))": model.layers
        * attention,
        f"{model.layers - routed_count} layers x {dense:.3g} feed-forward (3 x width x ffn_width)": (
            (model.layers - routed_count) * dense
        ),
        f"{routed_count} layers x {routed:.3g} experts (3 x width x expert width x count)": routed_count * routed,
        f"{model.vocab_size or 0} rows x {end_width(model)} embedding and head": (
            (model.vocab_size or 0) * end_width(model) * (1 if model.tie_embeddings else 2)
        ),
    }
    total = sum(parts.values())
    if total > MOST_PARAMETERS:
        terms = " + ".join(text for text, parameters in parts.items() if parameters)
        largest = max(parts, key=lambda text: parts[text])
        reason = f"{total:.3g} parameters are more than {MOST_PARAMETERS:.0e}, the most that is accepted: {terms}"
        culprits = ("experts", "count") if "experts" in largest else ("vocab_size",) if "rows" in largest else ("width",)
        others = tuple(("model", name) for name in ("width", "layers", "ffn_width", "head_dim", "heads"))
        yield Problem(("model", *culprits), reason, others)


def _too_long(config: Config) -> Iterator[Problem]:
    model, length = config.model, config.data.sequence_length
    streams, blocks = model.streams.count, model.altup.blocks
    size = length * streams * blocks * model.width * STATE_ELEMENT_BYTES
    if size > MOST_STATE_BYTES:
        reason = f"the residual of one sequence is {size:.3g} bytes, more than {MOST_STATE_BYTES:.0e}: sequence_length {length}"
        reason += f" x streams {streams} x blocks {blocks} x width {model.width} x {STATE_ELEMENT_BYTES} bytes"
        yield Problem(("data", "sequence_length"), reason, (("model", "width"),))
