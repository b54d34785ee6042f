"""Where records go: the sink protocol, the metrics file (the truth of a run) and its reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from megascale.config.errors import InputError
from megascale.observe.metrics import Record, check_record

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Sink(Protocol):
    """Something that takes the record of every step."""

    def write(self, record: Record) -> None:
        """Takes the metrics of one step."""

    def close(self) -> None:
        """Finishes what is under way. No record may follow."""


class FanOut:
    """Gives every record to several sinks, in order, after checking its names against the registry."""

    def __init__(self, sinks: Iterable[Sink]):
        self._sinks = tuple(sinks)

    def write(self, record: Record) -> None:
        """Writes to each sink. Raises KeyError for an unregistered name before any sink sees the record."""
        check_record(record)
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Closes every sink, also when one of them raises; that exception comes out at the end."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)


class JsonlSink:
    """Appends one JSON object per step to a file, each with the lineage of this start.

    Every line reaches the operating system before `write` returns, so a killed process loses nothing but the line it
    was writing. Finite floats round-trip exactly; NaN and infinities are the strings "nan", "inf", "-inf".
    """

    def __init__(self, path: Path, lineage: int):
        """Opens the file, and first cuts off a torn last line that a killed run left.

        Args:
            path: the metrics file; created when absent, in a folder that exists.
            lineage: number of this start, from `next_lineage`.
        """
        _cut_torn_line(path)
        self._lineage = lineage
        self._file = path.open("a", encoding="utf-8", buffering=1, newline="\n")

    def write(self, record: Record) -> None:
        """Appends the record. Raises OSError when the disk is full: without this file the run has no record."""
        encoded = {name: _encode(value) for name, value in record.items()}
        self._file.write(json.dumps({"lineage": self._lineage, **encoded}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def next_lineage(path: Path) -> int:
    """The lineage of a start now: one more than the highest in the metrics file, 1 when there is none."""
    if not path.exists():
        return 1
    return 1 + max((record["lineage"] for record in _lines(path)), default=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file: one per step, of its highest lineage, sorted by step.

    Lines of the same step and lineage are merged, the later one wins per name. A torn last line is left out.
    "nan", "inf" and "-inf" come back as floats. Raises InputError when the file is absent or damaged.
    """
    if not path.exists():
        raise InputError(str(path), "there is no metrics file", "name a run folder in which training has written a step")
    by_step: dict[int, dict[str, Any]] = {}
    for record in _lines(path):
        kept = by_step.get(record["step"])
        if kept is None or record["lineage"] > kept["lineage"]:
            by_step[record["step"]] = record
        elif record["lineage"] == kept["lineage"]:
            kept.update(record)
    return [by_step[step] for step in sorted(by_step)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The decoded complete lines of a metrics file, in order."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        yield _parse(line, f"{path}:{number}")


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = {name: _decode(value) for name, value in json.loads(line).items()}
        return {"step": record["step"], "lineage": record["lineage"], **record}
    except (ValueError, KeyError, AttributeError) as error:
        reason = f"not a metrics record ({error!r}): {line[:60]!r}"
        raise InputError(place, reason, "restore the file, or delete the line") from error


def _encode(value: float | int | str) -> float | int | str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _decode(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _cut_torn_line(path: Path) -> None:
    """Truncates a file to its last newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("r+b") as file:
            file.truncate(complete)
