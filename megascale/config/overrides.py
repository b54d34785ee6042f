"""Overrides from the command line: ``a.b=VALUE`` sets one place of a tree."""

from __future__ import annotations

import re
from typing import Any

from megascale.config.errors import InputError
from megascale.config.fields import KeyPath, dotted
from megascale.config.origin import Origin
from megascale.config.read_yaml import parse_yaml
from megascale.config.tree import Tree, forget

EXAMPLE = "write it as section.setting=VALUE, for example model.width=512 or data.sources.0.weight=2"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|[0-9]+", re.ASCII)
SECRET = re.compile(r"api_?key|secret|password|access_?token", re.IGNORECASE)


def apply_override(tree: Tree, text: str, number: int) -> None:
    """Replace what is at one path of the tree, in place.

    Args:
        tree: the settings so far.
        text: ``a.b=VALUE``; VALUE is YAML. List elements are named by their index, from 0.
        number: which override this is, from 1, for messages.

    Raises:
        InputError: no ``=``, no value, a broken path, or a path through something that is no section.
    """
    # No setting takes a secret; one given by mistake must not reach the logs through a message.
    shown = text.partition("=")[0] + "=..." if SECRET.search(text) else text
    place = f"override {number}: {shown}"
    path, value = _parse(text, place)
    parent = _parent(tree.values, path, place)
    last = path[-1]
    if isinstance(parent, list):
        parent[_index(parent, last, path[:-1], place)] = value
    elif isinstance(last, int):
        raise InputError(place, f"{dotted(path[:-1])} is not a list that the config sets", "set the whole list first")
    else:
        parent[last] = value
    forget(tree.origin, path)
    for found in _paths(value, path):
        tree.origin[found] = Origin(place)
    for length in range(1, len(path)):
        tree.origin.setdefault(path[:length], Origin(place))


def _parse(text: str, place: str) -> tuple[KeyPath, Any]:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(NAME.fullmatch(key) for key in keys):
        raise InputError(place, "is not an override", EXAMPLE)
    document = parse_yaml(value, place)
    if document.empty:
        raise InputError(place, "has no value", f"write {name}=null for no value, {name}='\"\"' for an empty text")
    return tuple(int(key) if key.isdigit() else key for key in keys), document.value


def _parent(values: dict[str, Any], path: KeyPath, place: str) -> Any:
    """The section or list that holds the last key of the path; missing sections are made."""
    current: Any = values
    for depth, key in enumerate(path[:-1]):
        if isinstance(current, list):
            current = current[_index(current, key, path[:depth], place)]
        elif isinstance(key, int):
            raise InputError(place, f"{dotted(path[:depth])} is not a list that the config sets", "set the whole list first")
        else:
            if current.get(key) is None:
                current[key] = {}
            current = current[key]
        if not isinstance(current, (dict, list)):
            raise InputError(place, f"{dotted(path[: depth + 1])} is a single value with nothing below it", EXAMPLE)
    return current


def _index(elements: list[Any], key: str | int, path: KeyPath, place: str) -> int:
    if isinstance(key, int) and key < len(elements):
        return key
    reason = f"{dotted(path)} is a list of {len(elements)} elements and has no element {key}"
    raise InputError(place, reason, "name an element by its index, from 0, or set the whole list")


def _paths(value: Any, path: KeyPath) -> list[KeyPath]:
    """The paths of a value and of everything in it."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, element in below for found in _paths(element, path + (key,)))]
