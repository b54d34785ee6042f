"""Which optimizer, learning rate and weight decay each parameter gets, by its name."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from megascale.config.errors import InputError
from megascale.config.schema import Muon, Optimizer, ParameterGroup
from megascale.parallel.engine import OptimizerGroup

BUILT_IN = (
    ("prefixes", ParameterGroup(pattern="layers.*.attention.prefix_*", weight_decay=0.0)),
    ("routers", ParameterGroup(pattern="layers.*.router.*", weight_decay=0.0)),
    ("embeddings", ParameterGroup(pattern="embedding.weight")),
    ("head", ParameterGroup(pattern="head.weight")),
)
"""Groups after the user's. Prefixes are activations rather than weights and routers need their scale: neither decays
(arXiv 2505.10475 trains prefixes as free vectors)."""

MUON_PATTERNS = ("layers.*.attention.?.weight", "layers.*.feed_forward.*")
"""Whole matrices inside the layers; never routers, whose rows are separate directions."""


def _named(name: str, dims: int, optimizer: Optimizer) -> tuple[str, ParameterGroup]:
    """The group of a parameter: the user's first match, else the built-in one, else matrices or scalars by its dimensions."""
    for i, group in enumerate(optimizer.groups):
        if fnmatchcase(name, group.pattern):
            return f"group_{i}", group
    for group_name, group in BUILT_IN:
        if fnmatchcase(name, group.pattern):
            return group_name, group
    vector = dims < 2 or ".residual." in name
    return ("scalars", ParameterGroup(pattern="*", weight_decay=0.0)) if vector else ("matrices", ParameterGroup(pattern="*"))


def check_patterns(optimizer: Optimizer, names: Collection[str]) -> None:
    """Refuse a pattern of `optimizer.groups` that matches none of the run's parameters, also of its later phases.

    Raises:
        InputError: names the pattern.
    """
    for i, group in enumerate(optimizer.groups):
        if not any(fnmatchcase(name, group.pattern) for name in names):
            place, some = f"optimizer.groups.{i}.pattern", ", ".join(list(names)[:4])
            raise InputError(place, f"{group.pattern!r} matches no parameter", f"names look like {some}, ...")


def trained_names(names: Mapping[str, int], optimizer: Optimizer, frozen: Container[str]) -> set[str]:
    """Which of the parameters, given with their dimensions, are trained."""
    return {name for name, dims in names.items() if name not in frozen and not _named(name, dims, optimizer)[1].frozen}


def optimizer_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: Optimizer,
    everywhere: Mapping[str, int] | None = None,
    new: Container[str] = (),
    frozen: Container[str] = (),
) -> list[OptimizerGroup]:
    """The groups of all trained parameters, in a fixed order; frozen parameters lose requires_grad and are left out.

    Args:
        parameters: of this rank, by global name.
        everywhere: name -> dimensions of the parameters of all ranks, so that all have the same groups (some of them empty here); none =
            this rank has them all.
        new: names of parameters that the phase under way adds; they form groups of their own, NAME_new.
        frozen: names of parameters that are not trained, whatever the groups say.

    Raises:
        InputError: everything is frozen, or all that a pattern matches is in `frozen`.
    """
    here = dict(parameters)
    dims = {name: p.ndim for name, p in here.items()} if everywhere is None else everywhere
    for i, pattern in enumerate(group.pattern for group in optimizer.groups):
        matched = [name for name in dims if fnmatchcase(name, pattern)]
        if matched and all(name in frozen for name in matched):
            reason = f"{pattern!r} matches only parameters that start.freeze keeps as they are"
            raise InputError(f"optimizer.groups.{i}.pattern", reason, "remove the group, or set start.freeze=false")
    found: dict[str, OptimizerGroup] = {}
    for name, ndim in dims.items():
        group_name, settings = _named(name, ndim, optimizer)
        if name in here:
            here[name].requires_grad_(not settings.frozen and name not in frozen)
        if settings.frozen or name in frozen:
            continue
        group = _group(name, ndim, group_name, settings, optimizer, name in new)
        members = found.setdefault(group.name, group).parameters
        if name in here:
            members[name] = here[name]
    if not found:
        raise InputError(
            "optimizer.groups", "every parameter is frozen: there is nothing to train", "leave at least one group trainable"
        )
    return list(found.values())


def _group(name: str, ndim: int, group_name: str, settings: ParameterGroup, optimizer: Optimizer, new: bool) -> OptimizerGroup:
    """The group of one parameter, still empty."""
    muon = optimizer.muon or Muon()
    vector = ndim < 2 or ".residual." in name
    by_muon = (
        optimizer.name == "muon" and not vector and any(fnmatchcase(name, p) for p in MUON_PATTERNS) and "router" not in name
    )
    label = group_name + ("_muon" if by_muon else "_vectors" if vector and group_name.startswith("group_") else "")
    decay = settings.weight_decay
    if decay is None:
        decay = 0.0 if vector else muon.weight_decay if by_muon else optimizer.weight_decay
    peak = (muon.lr if by_muon else optimizer.lr) * settings.lr_scale
    return OptimizerGroup(label + "_new" * new, "muon" if by_muon else "adamw", peak, decay, {}, new)
