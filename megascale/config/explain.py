"""Pydantic's errors in the user's words: what was given, what is expected, and which setting was probably meant."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

from pydantic import ValidationError

from megascale.config.fields import (
    KeyPath,
    allowed_values,
    describe,
    dotted,
    field_at,
    level_class,
    node_class,
    setting_paths,
)
from megascale.config.origin import Problem
from megascale.config.spellings import REASON_AGAINST, SETTING_OF

MOST_SUGGESTIONS = 3
MOST_UNKNOWN_BELOW = 8


def problems_of(error: ValidationError) -> list[Problem]:
    """Every error of a validation, in the order of the schema."""
    details = error.errors(include_url=False, include_context=False)
    broken = {detail["loc"][:-1] for detail in details if detail["loc"]}
    problems: list[Problem] = []
    for detail in details:
        path, given = detail["loc"], detail["input"]
        # A list with a broken element is also reported as too short.
        if detail["type"] == "too_short" and any(path == parent[: len(path)] for parent in broken):
            continue
        if detail["type"] == "extra_forbidden":
            problems += _unknown(path, given)
        elif detail["type"] == "missing":
            problems.append(Problem(path, f"is missing; expected {_expected(path)}"))
        else:
            problems.append(_wrong_value(path, given))
    return problems


def suggest(path: KeyPath) -> list[str]:
    """Settings that an unknown key may stand for, likeliest first, at most three dotted paths."""
    name = str(path[-1]).lower().replace("-", "_").strip("_")
    for spelling in (dotted(path[-2:]).lower(), name):
        if spelling in SETTING_OF:
            return [SETTING_OF[spelling]]
    section = level_class(path[:-1])
    siblings = list(section.model_fields) if section is not None else []
    by_leaf: dict[str, list[str]] = {}
    for setting in setting_paths():
        by_leaf.setdefault(setting[-1], []).append(dotted(setting))
    found = list(by_leaf.get(name, []))
    found += [dotted(path[:-1] + (match,)) for match in difflib.get_close_matches(name, siblings, 2, 0.6)]
    if not found:
        for match in difflib.get_close_matches(name, by_leaf, 2, 0.75):
            found += by_leaf[match]
    if not found:
        found = [SETTING_OF[match] for match in difflib.get_close_matches(name, SETTING_OF, 1, 0.85)]
    return list(dict.fromkeys(found))[:MOST_SUGGESTIONS]


def _unknown(path: KeyPath, given: Any) -> list[Problem]:
    """Problems for an unknown key; an unknown section is explained key by key. Values are not shown: they may be secrets."""
    reason_against = REASON_AGAINST.get(str(path[-1]).lower().replace("-", "_"))
    if reason_against:
        return [Problem(path, f"unknown setting: {reason_against}")]
    suggestions = suggest(path)
    if suggestions:
        return [Problem(path, f"unknown setting; did you mean {' or '.join(map(_with_meaning, suggestions))}?")]
    if isinstance(given, dict) and given:
        below = [problem for key in given for problem in _unknown(path + (key,), given[key])]
        return [Problem(path, "unknown section"), *below[:MOST_UNKNOWN_BELOW]]
    section = level_class(path[:-1])
    here = f"; {dotted(path[:-1]) or 'the top level'} has {', '.join(section.model_fields)}" if section is not None else ""
    return [Problem(path, f"unknown setting{here}")]


def _with_meaning(setting: str) -> str:
    field = field_at(tuple(setting.split(".")))
    return f"{setting} ({field.description})" if field is not None and field.description else setting


def _wrong_value(path: KeyPath, given: Any) -> Problem:
    field = field_at(path)
    if field is None:
        return Problem(path, f"given {_shown(given)}; expected a config: sections with settings")
    is_section = node_class(field.annotation) is not None and not isinstance(given, dict)
    if is_section and given is None:
        return Problem(path, "is empty; set something below it, or remove the line")
    return Problem(path, f"given {_shown(given)}; expected {_expected(path)}{_value_hint(field.annotation, given)}")


def _expected(path: KeyPath) -> str:
    field = field_at(path)
    assert field is not None, f"pydantic names a field that the schema lacks: {path}"
    meaning = f" ({field.description})" if field.description else ""
    return describe(field, element=isinstance(path[-1], int)) + meaning


def _value_hint(annotation: Any, given: Any) -> str:
    """A likely correction of the value, or nothing."""
    if isinstance(given, float) and not math.isfinite(given):
        return "; write a finite number"
    if isinstance(given, float) and given.is_integer() and abs(given) < 2**63:
        return f"; write {int(given)}"
    if isinstance(given, str):
        close = difflib.get_close_matches(given.lower(), allowed_values(annotation), 1, 0.5)
        if close:
            return f"; did you mean {close[0]}?"
        if given.lower() in ("yes", "no", "on", "off"):
            return f"; write {'true' if given.lower() in ('yes', 'on') else 'false'}"
    return ""


def _shown(value: Any) -> str:
    """A value as YAML would write it, cut to a readable length; long lists and sections lose their end."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
