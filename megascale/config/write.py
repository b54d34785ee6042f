"""A config as YAML text, as a digest, and compared with another."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megascale.config.fields import KeyPath, dotted, node_class
from megascale.config.inactive import inactive
from megascale.config.read_yaml import scalar_kind
from megascale.config.resolve import resolve
from megascale.config.schema import Config, Node

DECISIVE_SECTIONS = ("model", "data", "batch", "optimizer", "schedule")
PLAIN_TEXT = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*", re.ASCII)


def dump(config: Config, comments: bool = True, notes: Mapping[KeyPath, str] | None = None) -> str:
    """YAML text that `load_config` reads back to the same config.

    Settings without effect (those of experts in a dense model, say) are left out while they have their default: the
    checks would refuse them as set but unused. With comments they stand there commented out.

    Args:
        config: the tree.
        comments: write the meaning of each setting behind it.
        notes: further remarks by path, written behind the settings.
    """
    writer = _Writer(comments, notes or {}, inactive(config))
    writer.section(config, (), "")
    return "\n".join(writer.lines) + "\n"


def dump_section(config: Config, name: str) -> str:
    """YAML text of one section, without comments: a file that another one can include."""
    writer = _Writer(False, {}, inactive(config))
    writer.lines.append(f"{name}:")
    writer.section(getattr(config, name), (name,), "  ")
    return "\n".join(writer.lines) + "\n"


def digest(config: Config) -> str:
    """SHA-256, in hex, of the settings that decide what is trained: equal digests train the same model.

    Counted: model, start, data, batch, optimizer, schedule, precision and the seed, after derived values are filled in. Not
    counted: names, folders, layout, compilation, observation, checkpoints, profiling and guards. Take both digests
    either before or after ``model.vocab_size`` is filled in from the data.

    Raises:
        InputError: derived values cannot be filled in.
    """
    tree = resolve(config).model_dump(mode="json")
    decisive = {name: tree[name] for name in (*DECISIVE_SECTIONS, "precision")} | {"seed": tree["run"]["seed"]}
    if tree["start"]["model"] is not None:
        decisive["start"] = tree["start"]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def difference(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """The settings in which two configs differ: dotted path, first value, second value, in the order of the schema.

    Values are plain (lists, mappings, scalars). Lists of different length, and sections that one side lacks, are
    compared as a whole.
    """
    return _difference(first, second, ())


def _difference(first: Any, second: Any, path: KeyPath) -> list[tuple[str, Any, Any]]:
    if isinstance(first, Node) and isinstance(second, Node):
        names = list(type(first).model_fields)
        return [row for name in names for row in _difference(getattr(first, name), getattr(second, name), path + (name,))]
    if first == second:
        return []
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [row for index, (one, other) in pairs for row in _difference(one, other, path + (index,))]
    return [(dotted(path), _plain(first), _plain(second))]


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.model_dump(mode="json")
    return [_plain(element) for element in value] if isinstance(value, tuple) else value


@dataclass
class _Writer:
    """Collects the lines of a YAML text."""

    comments: bool
    notes: Mapping[KeyPath, str]
    unused: Mapping[KeyPath, str]
    lines: list[str] = field(default_factory=list)

    def section(self, node: Node, path: KeyPath, indent: str) -> None:
        """Write every setting of a node."""
        for name, info in type(node).model_fields.items():
            value, here = getattr(node, name), path + (name,)
            if isinstance(value, Node):
                self._subsection(name, value, here, indent)
            elif here in self.unused and value == info.get_default():
                if self.comments:
                    self.lines.append(f"{indent}# {name}: {_scalar(value)}  # {info.description}; no effect: {self.unused[here]}")
            elif isinstance(value, tuple) and value and node_class(info.annotation) is not None:
                self._setting(f"{indent}{name}:", here, info.description)
                for index, element in enumerate(value):
                    self._element(element, here + (index,), indent + "  ")
            else:
                self._setting(f"{indent}{name}: {_scalar(value)}", here, info.description)

    def _subsection(self, name: str, node: Node, path: KeyPath, indent: str) -> None:
        """Write a section; one without any setting that has an effect becomes a comment, for an empty one is refused."""
        start = len(self.lines)
        self._open(name, type(node), indent)
        header = len(self.lines) - 1
        self.section(node, path, indent + "  ")
        if any(not line.lstrip().startswith("#") for line in self.lines[header + 1 :]):
            return
        if self.comments:
            self.lines[header] = f"{indent}# {name}:"
        else:
            del self.lines[start:]

    def _open(self, name: str, section: type[Node], indent: str) -> None:
        if not indent and self.lines:
            self.lines.append("")
        if self.comments:
            self.lines.append(f"{indent}# {(section.__doc__ or '').splitlines()[0]}")
        self.lines.append(f"{indent}{name}:")

    def _element(self, element: Node, path: KeyPath, indent: str) -> None:
        """Write one node of a list; its first setting goes behind the dash."""
        start = len(self.lines)
        self.section(element, path, indent + "  ")
        self.lines[start] = f"{indent}- {self.lines[start].lstrip()}"

    def _setting(self, text: str, path: KeyPath, meaning: str | None) -> None:
        remarks = [remark for remark in (meaning if self.comments else None, self.notes.get(path)) if remark]
        self.lines.append(f"{text}  # {'; '.join(remarks)}" if remarks else text)


def _scalar(value: Any) -> str:
    """A scalar, or a list or mapping on one line."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {_scalar(below)}" for key, below in value.items()) + "}"
    if isinstance(value, str):
        plain = PLAIN_TEXT.fullmatch(value) and scalar_kind(value) == "str"
        return value if plain else _quoted(value)
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return json.dumps(value)


def _quoted(text: str) -> str:
    """A text in quotes, with everything escaped that is not printable ASCII."""
    return yaml.dump(text, default_style='"', width=float("inf")).rstrip("\n")
