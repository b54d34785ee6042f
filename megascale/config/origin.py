"""Where settings were set, and errors that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megascale.config.errors import InputError
from megascale.config.fields import KeyPath, dotted

REMEDY = "`megascale config show --comments` lists every setting with its meaning"


@dataclass(frozen=True)
class Origin:
    """Where one setting was set.

    Attributes:
        source: a file, or ``override N: TEXT``.
        line: the line in the file, from 1; none for overrides.
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config.

    Attributes:
        path: the setting that is wrong, or would have to change.
        reason: what is wrong, with the numbers, and what would be right.
        others: further settings that take part, likeliest culprit first.
    """

    path: KeyPath
    reason: str
    others: tuple[KeyPath, ...] = ()


def place_of(path: KeyPath, origin: Mapping[KeyPath, Origin], file: str) -> str:
    """Where a setting was set; failing that, the section around it; failing that, the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in origin:
            return str(origin[path[:length]])
    return file


def raise_problems(problems: Sequence[Problem], origin: Mapping[KeyPath, Origin], file: str, remedy: str = REMEDY) -> None:
    """Raise one error that lists every problem, one a line, and the remedy; nothing happens where there is none.

    Raises:
        InputError: there are problems.
    """
    if not problems:
        return
    lines = [f"{place_of(problem.path, origin, file)}: {dotted(problem.path)}: {problem.reason}" for problem in problems]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise InputError(file, f"{count} in the config\n  " + "\n  ".join(lines), remedy)
