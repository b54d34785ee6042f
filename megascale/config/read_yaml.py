"""YAML text to plain values with the line of every key: the YAML 1.2 core schema, and nothing that can run code.

PyYAML parses the syntax only. Its own (YAML 1.1) reading of scalars would make a string of ``1e-4``, false of ``no``,
45000 of ``12:30:00``, and would let the last of two equal keys win.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from megascale.config.errors import InputError
from megascale.config.fields import KeyPath, dotted

CORE_SCHEMA = {
    "null": re.compile(r"~|null|Null|NULL|", re.ASCII),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
}
DEEPEST = 32
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Document:
    """A parsed text.

    Attributes:
        value: mappings, lists, strings, integers, floats, booleans and none.
        lines: the line (from 1) of every key and list element, by path from the top.
        empty: whether the text holds nothing but blanks and comments.
    """

    value: Any
    lines: dict[KeyPath, int]
    empty: bool


class _Loader(yaml.SafeLoader):
    """Syntax only: plain scalars get a tag of the core schema, aliases are refused."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _name, _pattern in CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern.pattern})\\Z"), None)


def scalar_kind(text: str) -> str:
    """What the core schema reads a plain scalar as: ``null``, ``bool``, ``int``, ``float`` or ``str``."""
    return next((name for name, pattern in CORE_SCHEMA.items() if pattern.fullmatch(text)), "str")


def parse_yaml(text: str, place: str) -> Document:
    """Parse one YAML document.

    Args:
        text: the YAML text.
        place: what the user calls it (a file, ``override 1``); errors add the line.

    Raises:
        InputError: broken syntax, tabs, duplicate keys, tags, aliases, several documents, keys that are no strings.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{place}{line}", f"not valid YAML: {error.problem or error.context}", _syntax_remedy(error)) from error
    except yaml.YAMLError as error:
        raise InputError(place, f"not valid YAML: {' '.join(str(error).split())}", "save it as plain UTF-8 text") from error
    except RecursionError as error:
        raise InputError(place, f"nested more than {DEEPEST} levels deep", "a config needs five") from error
    except (ValueError, OverflowError) as error:
        raise InputError(place, f"an escape names no character: {error}", "write the character itself") from error
    lines: dict[KeyPath, int] = {}
    if node is None:
        return Document(None, lines, empty=True)
    return Document(_value(node, (), lines, place), lines, empty=False)


def _syntax_remedy(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "'\\t'" in problem:
        return "indent and separate with spaces, never with tabs"
    if "aliases" in problem:
        return "write the value again, or put the shared part into a file of its own and `include` it"
    return "check the indentation, brackets and quotes on this line and the one before"


def _value(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], place: str) -> Any:
    """The plain value of a node; notes the line of every key below it."""
    here = f"{place}:{node.start_mark.line + 1}"
    if len(path) > DEEPEST:
        raise InputError(here, f"nested more than {DEEPEST} levels deep", "a config needs five")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, path, lines, place)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        elements = []
        for index, element in enumerate(node.value):
            lines[path + (index,)] = element.start_mark.line + 1
            elements.append(_value(element, path + (index,), lines, place))
        return elements
    if isinstance(node, yaml.ScalarNode) and kind in {*CORE_SCHEMA, "str"}:
        return _scalar(node.value, kind, here)
    raise InputError(here, f"the tag {kind} is refused", "remove the !tag: configs hold plain values only")


def _mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], place: str) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        here = f"{place}:{line}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise InputError(here, f"{text} is not a name", "keys are the names of settings")
        key = _scalar(key_node.value, "str", here)
        if key == "<<":
            raise InputError(here, "merge keys (<<) are not supported", "put the shared part into a file and `include` it")
        if key in mapping:
            first = lines[path + (key,)]
            raise InputError(here, f"{dotted(path + (key,))} is set twice, first on line {first}", "remove one of the two")
        lines[path + (key,)] = line
        mapping[key] = _value(value_node, path + (key,), lines, place)
    return mapping


def _scalar(text: str, kind: str, here: str) -> Any:
    """Convert a scalar that was resolved, or tagged by hand, as `kind`."""
    if kind == "str":
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(here, "the text holds half of a surrogate pair", "write the character itself")
        return text
    if not CORE_SCHEMA[kind].fullmatch(text):
        raise InputError(here, f"{text!r} is tagged as {kind} but is none", "remove the !tag")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return _integer(text, here)


def _integer(text: str, here: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    # Python refuses decimal texts of over 4300 digits with an error of its own.
    value = int(text, base) if len(text) < 100 else LARGEST_INTEGER + 1
    if abs(value) > LARGEST_INTEGER:
        raise InputError(here, f"the integer {text[:40]} does not fit 64 bits", f"the largest is {LARGEST_INTEGER}")
    return value
