"""A table of runs: numbers by symbol, one row a run, and where it came from. Read from csv files, gzip-compressed ones too."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megascale.laws.form import Array, meaningless
from megascale.laws.refusals import BadTable

LOSS = "loss"
"""the column that is fitted"""


@dataclass(frozen=True)
class RunTable:
    """Runs and their losses."""

    place: str
    """the file or folders it was read from, for messages"""
    columns: Mapping[str, Array]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """columns of text, such as the router"""
    notes: tuple[str, ...] = ()
    """what was left out in reading"""

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def loss(self) -> Array:
        """The measured losses."""
        return self.columns[LOSS]

    def inputs(self, symbols: Iterable[str]) -> dict[str, Array]:
        """Some columns. BadTable when one is missing, or holds a number that is not positive or has no meaning."""
        missing = [symbol for symbol in symbols if symbol not in self.columns]
        for symbol in missing:
            if symbol in self.labels and not all(map(_finite, self.labels[symbol])):
                raise _no_number(self.place, symbol, self.labels[symbol])
        if missing:
            reason = f"has no column {', '.join(missing)}; it has {', '.join(self.columns)}"
            raise BadTable(
                self.place, reason, f"name it: --map {missing[0]}=COLUMN, or give one value to all: --map {missing[0]}=1e9"
            )
        found = {symbol: self.columns[symbol] for symbol in symbols}
        for symbol, column in found.items():
            if not np.all(column > 0):
                raise BadTable(
                    self.place, f"holds a {symbol} of {column.min():g}; the laws take logarithms", "correct it or leave it out"
                )
            senseless = next((value for value in column.tolist() if meaningless(symbol, value)), None)
            if senseless is not None:
                reason = f"holds a {symbol} of {senseless:g}, which {meaningless(symbol, senseless)}"
                raise BadTable(self.place, reason, "correct it or leave the run out")
        return found

    def rows(self, chosen: Sequence[int] | Array) -> RunTable:
        """Some of the runs."""
        index = np.asarray(chosen)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        columns = {symbol: column[index] for symbol, column in self.columns.items()}
        labels = {name: tuple(column[i] for i in index) for name, column in self.labels.items()}
        return RunTable(self.place, columns, labels, self.notes)


def read_csv(
    path: Path, mapping: Mapping[str, str] | None = None, where: Mapping[str, Sequence[str]] | None = None, run: str | None = None
) -> RunTable:
    """Read a csv file; lines that start with # are comments.

    Args:
        mapping: symbol -> column of the file, or a number for all rows. Columns whose name is a symbol need none.
        where: column -> values; other rows are left out.
        run: column that names the run, in files with a row for each evaluation: the last row with a loss counts.

    Raises:
        BadTable: no such file or column, no row left, a cell that is no number, a loss or input that is not positive.
    """
    rows = _read(path)
    mapping = {symbol: symbol for symbol in rows[0] if symbol not in (mapping or {}).values()} | dict(mapping or {})
    for symbol, column in mapping.items():
        if column not in rows[0] and _number(column) is None:
            raise BadTable(str(path), f"has no column {column!r} for {symbol}", f"it has {', '.join(rows[0])}")
    for column in [*(where or {}), *([run] if run else [])]:
        if column not in rows[0]:
            raise BadTable(str(path), f"has no column {column!r}", f"it has {', '.join(rows[0])}")
    if LOSS not in mapping:
        raise BadTable(str(path), "has no column of losses", f"name it: --map {LOSS}=COLUMN; it has {', '.join(rows[0])}")
    kept = [row for row in rows if all(row[column] in values for column, values in (where or {}).items())]
    if not kept:
        raise BadTable(str(path), f"none of its {len(rows)} rows fits {dict(where or {})}", "check the values")
    if run is not None:
        last = {row[run]: row for row in kept if row[mapping[LOSS]] != ""}
        kept = list(last.values())
    return _table(str(path), mapping, kept)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise BadTable(str(path), "there is no such file", "give a csv file, or a run folder")
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadTable(str(path), f"is no text: {error}", "give a csv file in UTF-8, plain or gzip-compressed") from error
    lines = [line for line in io.StringIO(text) if not line.startswith("#") and line.strip()]
    reader = csv.DictReader(lines)
    names = [name.strip() for name in reader.fieldnames or ()]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise BadTable(str(path), f"has several columns named {', '.join(twice)}", "rename or remove all but one")
    reader.fieldnames = names
    rows = [dict(row) for row in reader]
    if not rows:
        raise BadTable(str(path), "holds no row", "the first line names the columns, each further line is a run")
    if any(None in row or None in row.values() for row in rows):
        raise BadTable(str(path), "has rows with more or fewer cells than its first line", "give each row one cell a column")
    return rows


def _table(place: str, mapping: Mapping[str, str], rows: list[dict[str, str]]) -> RunTable:
    columns: dict[str, Array] = {}
    labels: dict[str, tuple[str, ...]] = {}
    for symbol, source in mapping.items():
        if (number := _number(source)) is not None and source not in rows[0]:
            columns[symbol] = np.full(len(rows), number)
            continue
        numbers = [_number(row[source]) for row in rows]
        if all(_finite(row[source]) for row in rows):
            columns[symbol] = np.array(numbers, dtype=np.float64)
        elif symbol == LOSS or (source != symbol and any(number is not None for number in numbers)):
            raise _no_number(place, source, [row[source] for row in rows])
        else:
            labels[symbol] = tuple(row[source] for row in rows)
    if not np.all(columns[LOSS] > 0):
        raise BadTable(place, "holds a loss that is not positive", "give losses in nats per token, not their logarithms")
    return RunTable(place, columns, labels)


def _no_number(place: str, column: str, cells: Sequence[str]) -> BadTable:
    """Names the first cell that is no finite number."""
    run, cell = next((i, cell) for i, cell in enumerate(cells) if not _finite(cell))
    return BadTable(place, f"run {run + 1}: {column} is {cell!r}, not a number", "correct it or leave the run out")


def _finite(text: str) -> bool:
    number = _number(text)
    return number is not None and math.isfinite(number)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
