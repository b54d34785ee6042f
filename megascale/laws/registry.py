"""All laws and all forms by name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from megascale.config.errors import InputError
from megascale.laws.families import (
    additive,
    axes,
    besiroglu,
    chinchilla,
    compute_only,
    joint_moe,
    kaplan,
    krajewski,
    ling,
    muennighoff,
    parscale,
    routed,
    sardana,
    utilisation,
)
from megascale.laws.form import Form
from megascale.laws.law import Law

Entry = TypeVar("Entry")

_FAMILIES = (
    parscale, routed, utilisation, compute_only, kaplan, chinchilla, besiroglu, muennighoff, sardana, krajewski, joint_moe, ling,
)  # fmt: skip

LAWS: dict[str, Law] = {law.name: law for family in _FAMILIES for law in family.LAWS}
"""The published laws."""

FORMS: dict[str, Form] = {
    form.name: form
    for forms in (
        parscale.FORMS, routed.FORMS, utilisation.FORMS, compute_only.FORMS, (additive.ADDITIVE,), kaplan.FORMS, muennighoff.FORMS,
        krajewski.FORMS, joint_moe.FORMS, axes.FORMS,
    )
    for form in forms
}  # fmt: skip
"""What can be fitted."""


def law_named(name: str) -> Law:
    """The law of that name. InputError, with the nearest names, when there is none."""
    return _named(LAWS, name, "law", "megascale laws list")


def form_named(name: str) -> Form:
    """The form of that name. InputError, with the nearest names, when there is none."""
    return _named(FORMS, name, "form", "megascale laws list --forms")


def _named(known: Mapping[str, Entry], name: str, kind: str, command: str) -> Entry:
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"{kind} {name!r}", "is not in the registry", f"{hint}`{command}` lists them")
