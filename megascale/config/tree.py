"""A tree of plain settings beside the places that set them; trees are laid over each other here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megascale.config.fields import KeyPath
from megascale.config.origin import Origin


@dataclass
class Tree:
    """Settings that are not checked yet.

    Attributes:
        values: nested mappings, lists and scalars.
        origin: where each key and list element of `values` was set.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[KeyPath, Origin] = field(default_factory=dict)


def merge(base: Tree, top: Tree) -> None:
    """Lay `top` over `base`, in place: sections are merged key by key, everything else is replaced."""
    _merge_level(base.values, top.values, base.origin, top.origin, ())


def _merge_level(
    base: dict[str, Any],
    top: dict[str, Any],
    base_origin: dict[KeyPath, Origin],
    top_origin: dict[KeyPath, Origin],
    path: KeyPath,
) -> None:
    for key, value in top.items():
        here = path + (key,)
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            base_origin[here] = top_origin[here]
            _merge_level(base[key], value, base_origin, top_origin, here)
            continue
        base[key] = value
        forget(base_origin, here)
        base_origin.update({found: place for found, place in top_origin.items() if found[: len(here)] == here})


def forget(origin: dict[KeyPath, Origin], path: KeyPath) -> None:
    """Drop the places of a setting and of all below it."""
    for found in [found for found in origin if found[: len(path)] == path]:
        del origin[found]
