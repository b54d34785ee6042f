"""Config files and overrides to one checked tree that knows where each of its settings was set."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megascale.config.errors import InputError
from megascale.config.explain import problems_of
from megascale.config.fields import KeyPath
from megascale.config.origin import Origin, place_of, raise_problems
from megascale.config.overrides import apply_override
from megascale.config.read_yaml import parse_yaml
from megascale.config.schema import Config
from megascale.config.tree import Tree, merge

INCLUDE = "include"


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where it came from.

    Attributes:
        config: the tree, with defaults filled in; derived values are still none (`megascale.config.resolve`).
        origin: file and line, or override, of everything that was set: settings, and the sections and lists around them.
        file: the config file, as the user named it.
    """

    config: Config
    origin: dict[KeyPath, Origin] = field(default_factory=dict)
    file: str = "config"

    def is_set(self, *path: str | int) -> bool:
        """Whether a setting, or anything in a section, was set by a file or override."""
        return path in self.origin

    def place(self, *path: str | int) -> str:
        """Where a setting was set: ``FILE:LINE`` or the override; the file where it was not."""
        return place_of(path, self.origin, self.file)


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config file, what it includes, and overrides; later ones win.

    ``include: [FILE, ...]`` at the top of a file reads other files first, relative to it. Sections are merged key by
    key, lists are replaced. An override ``a.b=VALUE`` replaces what is at ``a.b``, a whole section too.

    Args:
        path: the YAML file.
        overrides: texts such as ``model.width=512`` or ``data.sources.0.weight=2``, in order.

    Raises:
        InputError: a file is missing, unreadable or no YAML; files include each other; an override is malformed; or the
            settings are wrong, in which case every wrong one is listed.
    """
    tree = _read_file(path, str(path), ())
    for number, text in enumerate(overrides, 1):
        apply_override(tree, text, number)
    return validate(tree, str(path))


def validate(tree: Tree, file: str) -> LoadedConfig:
    """Check types, limits and names of a tree of plain values.

    Raises:
        InputError: lists every wrong setting.
    """
    try:
        # Through JSON: strict nodes take a list for a tuple and an integer for a float from JSON only.
        config = Config.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        raise_problems(problems_of(error), tree.origin, file)
        raise AssertionError("pydantic reported an error without details") from error
    return LoadedConfig(config, tree.origin, file)


def _read_file(path: Path, shown: str, including: tuple[Path, ...]) -> Tree:
    """The tree of one file on top of the trees that it includes.

    Args:
        path: the file.
        shown: how messages name it.
        including: the files that led here, outermost first, resolved.
    """
    resolved = path.resolve()
    if resolved in including:
        chain = " -> ".join(file.name for file in (*including, resolved))
        raise InputError(shown, f"files include each other: {chain}", "remove one of these includes")
    document = parse_yaml(_read_text(path, shown, including), shown)
    if document.empty:
        raise InputError(shown, "the file holds no settings", "write at least a run name:\nrun:\n  name: my-run")
    if not isinstance(document.value, dict):
        kind = "a list" if isinstance(document.value, list) else "a single value"
        raise InputError(f"{shown}:1", f"holds {kind}, not sections", "start with sections, for example:\nmodel:\n  width: 256")
    values: dict[str, Any] = document.value
    place = f"{shown}:{document.lines.get((INCLUDE,), 1)}"
    tree = Tree()
    for include in _include_list(values.pop(INCLUDE, []), place):
        name = os.path.normpath(Path(shown).parent / include)
        merge(tree, _read_file(path.parent / include, name, (*including, resolved)))
    origin = {key: Origin(shown, line) for key, line in document.lines.items() if key[0] != INCLUDE}
    merge(tree, Tree(values, origin))
    return tree


def _include_list(value: Any, place: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(place, "include is neither a file nor a list of files", "write include: [../models/small.yaml]")
    return names


def _read_text(path: Path, shown: str, including: tuple[Path, ...]) -> str:
    by = f"; it is included by {including[-1].name}" if including else ""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(shown, f"there is no such file{by}", "includes are relative to the file that names them") from error
    except OSError as error:
        raise InputError(shown, f"cannot be read{by}: {error.strerror}", "name a YAML file that you may read") from error
    except UnicodeDecodeError as error:
        raise InputError(shown, f"is not UTF-8 text{by}: byte {error.start}", "name a YAML file saved as UTF-8") from error
