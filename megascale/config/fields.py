"""What the schema says about a setting, by its path: its field, its type in words, its limits."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megascale.config.schema import Config, Node

KeyPath = tuple["str | int", ...]
"""The way from the top of a tree to a setting: names, and indices of list elements."""

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def dotted(path: KeyPath) -> str:
    """``("data", "sources", 0, "path")`` as ``data.sources.0.path``."""
    return ".".join(map(str, path))


def leaves(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every setting below a node with its value; empty lists and lists of scalars count as one setting each."""
    for name in type(node).model_fields:
        value, here = getattr(node, name), path + (name,)
        if isinstance(value, Node):
            yield from leaves(value, here)
        elif isinstance(value, tuple) and value and isinstance(value[0], Node):
            for index, element in enumerate(value):
                yield from leaves(element, here + (index,))
        else:
            yield here, value


def node_class(annotation: Any) -> type[Node] | None:
    """The node class that an annotation holds: itself, or below ``| None`` and ``tuple[..., ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return annotation
    found = (node_class(argument) for argument in get_args(annotation) if argument is not Ellipsis)
    return next((kind for kind in found if kind is not None), None)


def level_class(path: KeyPath) -> type[Node] | None:
    """The node class of a section; none where the schema has no section at this path."""
    current: type[Node] | None = Config
    for key in path:
        if isinstance(key, int):
            continue
        field = current.model_fields.get(key) if current is not None else None
        current = node_class(field.annotation) if field is not None else None
    return current


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field of a setting; list elements answer with the field of their list."""
    names = [key for key in path if isinstance(key, str)]
    section = level_class(tuple(names[:-1])) if names else None
    return section.model_fields.get(names[-1]) if section is not None else None


def setting_paths(section: type[Node] = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all settings and sections that the schema knows, without list indices, top down."""
    for name, field in section.model_fields.items():
        yield path + (name,)
        below = node_class(field.annotation)
        if below is not None:
            yield from setting_paths(below, path + (name,))


def allowed_values(annotation: Any) -> list[Any]:
    """The values of a ``Literal``; empty for every other annotation."""
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def describe(field: FieldInfo, element: bool = False) -> str:
    """What a field takes, in words: ``an integer > 0, or null``.

    Args:
        field: the field.
        element: describe one element of the field's list, not the list.
    """
    annotation = field.annotation
    if element and get_origin(annotation) is tuple:
        return _words(get_args(annotation)[0])
    limits = []
    for limit in field.metadata:
        limits += [f"{sign} {getattr(limit, name)}" for name, sign in LIMITS.items() if hasattr(limit, name)]
        if getattr(limit, "pattern", None):
            limits.append(f"of the form {limit.pattern}")
        if getattr(limit, "min_length", None):
            limits.append(f"at least {limit.min_length}")
    main, *optional = _words(annotation).split(", or null")
    before_limits = ", " if get_origin(annotation) is tuple else " "
    return (main + before_limits + " and ".join(limits) if limits else main) + (", or null" if optional else "")


def _words(annotation: Any) -> str:
    if annotation in WORDS:
        return WORDS[annotation]
    if allowed_values(annotation):
        return "one of " + ", ".join(map(str, allowed_values(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        main = next(argument for argument in get_args(annotation) if argument is not type(None))
        return f"{_words(main)}, or null"
    if get_origin(annotation) is tuple:
        first, *rest = get_args(annotation)
        if rest == [Ellipsis]:
            return f"a list, each element {_words(first)}"
        return f"a list of {1 + len(rest)}, each {_words(first)}"
    if get_origin(annotation) is dict:
        return "a section with any settings"
    section = node_class(annotation)
    assert section is not None, f"the schema uses a type without words: {annotation}"
    return f"a section with {', '.join(section.model_fields)}"
