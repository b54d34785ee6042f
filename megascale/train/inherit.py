"""What a model takes over from one that was trained before: the same tensors, experts as copies; and what is new in it.

Used where a run starts from another model, and at the border between phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megascale.checkpoint.hugging_face.settings import essential
from megascale.checkpoint.layout import Shape
from megascale.checkpoint.weights import BUFFERS, WEIGHTS
from megascale.config.errors import InputError
from megascale.config.schema import AltUp, Model, Node
from megascale.model.upcycle import check_upcycling, dense_name, starts_as_dense, starts_at_zero
from megascale.parallel.shard import named_parameters, whole_on_meta

ADDABLE = ("streams", "experts", "altup")
UNSEEN = ("init_std",)
"""Settings of which no forward pass knows."""


@dataclass(frozen=True)
class Inheritance:
    """How one model's tensors become another's.

    Attributes:
        taken: our tensor, as checkpoints name it (model/..., buffer/...), -> the earlier model's. Where ours has a first dimension more,
            each of its rows is a copy.
        shapes: of our tensors in `taken`.
        new: parameters that the earlier model lacks.
        zeroed: those of them that start at 0 instead of as in a new model.
    """

    taken: Mapping[str, str]
    shapes: Mapping[str, Shape]
    new: frozenset[str]
    zeroed: frozenset[str]

    @property
    def inherited(self) -> frozenset[str]:
        """The parameters that the earlier model has."""
        return frozenset(name.removeprefix(WEIGHTS) for name in self.taken if name.startswith(WEIGHTS))


def inherit(before: Model, model: Model) -> Inheritance:
    """What a model takes over from an earlier one; both resolved, with the vocabulary's size, and compatible (`check_start`)."""
    upcycles = before.experts.count == 1 < model.experts.count
    earlier, ours = _shapes(before), _shapes(model)
    taken: dict[str, str] = {}
    for key, shape in ours.items():
        kind, _, name = key.partition("/")
        source = dense_name(name, model) if upcycles else name
        there = earlier.get(f"{kind}/{source}")
        if there == shape or (upcycles and source != name and there == shape[1:]):
            taken[key] = f"{kind}/{source}"
    new = frozenset(key.removeprefix(WEIGHTS) for key in ours.keys() - taken.keys() if key.startswith(WEIGHTS))
    zeroed = frozenset(name for name in new if upcycles and starts_at_zero(name))
    return Inheritance(taken, {key: ours[key] for key in taken}, new, zeroed)


def _shapes(model: Model) -> dict[str, Shape]:
    decoder = whole_on_meta(model)
    parameters = {WEIGHTS + name: tuple(parameter.shape) for name, parameter in named_parameters(decoder).items()}
    return parameters | {BUFFERS + name: tuple(buffer.shape) for name, buffer in decoder.named_buffers()}


def check_start(before: Model, model: Model, place: str) -> None:
    """Refuse a model that is not the earlier one plus streams, experts or blocks. Both are resolved, with the vocabulary's size.

    Args:
        place: of the earlier model, for the message.

    Raises:
        InputError: one error that names every setting that differs, with both values.
    """
    rows = list(_differences(before, model))
    if rows:
        reason = "; ".join(f"{path} is {ours}, the model there has {theirs}" for path, ours, theirs in rows)
        remedy = " ".join(f"{path}={theirs}" for path, _, theirs in rows)
        raise InputError(f"start.model: {place}", reason, f"set {remedy} (`megascale config model {place}` prints all of them)")
    if before.streams.count > model.streams.count:
        reason = f"model.streams.count is {model.streams.count}, the model there has {before.streams.count}"
        remedy = f"streams can be added, not removed: set {before.streams.count} or more"
        raise InputError(f"start.model: {place}", reason, remedy)
    if model.altup.form == "wide" and before.altup.form != "wide":
        reason = "wide widens the embedding, the last norm and the head, which can then not be taken over"
        raise InputError("model.altup.form", reason, "set recycled, or train without start.model")
    if before.experts.count == 1 < model.experts.count:
        check_upcycling(before, model)


def _differences(before: Model, model: Model) -> Iterator[tuple[str, object, object]]:
    """(setting, here, there) of those that have to be equal and are not."""
    before, model = essential(before), essential(model)
    for name in type(model).model_fields:
        ours, theirs = getattr(model, name), getattr(before, name)
        if name in UNSEEN or ours == theirs or (name in ADDABLE and _adds(name, before, model)):
            continue
        if isinstance(ours, Node):
            fields = [field for field in type(ours).model_fields if getattr(ours, field) != getattr(theirs, field)]
            yield from ((f"model.{name}.{field}", getattr(ours, field), getattr(theirs, field)) for field in fields)
        else:
            yield f"model.{name}", ours, theirs


def _adds(section: str, before: Model, model: Model) -> bool:
    """Whether a section of the model may differ because it is new, or begins anew (prefixes and aggregator of another P)."""
    if section == "streams":
        return before.streams.count != model.streams.count
    if section == "experts":
        return before.experts.count == 1
    return before.altup == AltUp()


def first_loss(before: Model, model: Model) -> str:
    """Whether the model computes at first what the earlier one computes, in words."""
    changed = []
    if before.streams.count != model.streams.count:
        changed.append(f"the prefixes of its {model.streams.count} streams are random")
    if before.experts.count == 1 < model.experts.count and not starts_as_dense(model.experts):
        changed.append("its experts' gates do not sum to 1, or tokens are dropped")
    if model.altup.form == "sequence" and before.altup.form != "sequence":
        changed.append(f"most layers compute on one of {model.altup.stride} tokens")
    if changed:
        return f"its first loss is not that of the model there: {'; '.join(changed)}"
    return "its first loss is that of the model there" + (", up to rounding" if before != model else "")
