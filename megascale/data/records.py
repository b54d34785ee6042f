"""Documents that are records: lines of JSON, parquet files, and Hugging Face data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.config.errors import InputError
from megascale.data.documents import Document, checked_document

if TYPE_CHECKING:
    from datasets import Dataset

_SCAN_BYTES = 1 << 24


def record_document(name: str, record: object, field: str, largest_document: int) -> Document:
    """The document in one field of a record."""
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        return Document(name, b"", "missing_field")
    # A JSON string may hold half of a surrogate pair, which no UTF-8 text can.
    if any("\ud800" <= character <= "\udfff" for character in value):
        return Document(name, b"", "encoding")
    return checked_document(name, value.encode("utf-8"), largest_document)


@dataclass(frozen=True)
class JsonLinesPart:
    """A range of lines, possibly over several files; see `JsonLines`."""

    pieces: list[tuple[Path, str, int, list[int]]]
    field: str
    largest_document: int

    def documents(self) -> Iterator[Document]:
        """One document a line."""
        for path, name, first_line, offsets in self.pieces:
            with open(path, "rb") as file:
                for line, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True), start=first_line):
                    file.seek(start)
                    yield self._document(f"{name}:{line + 1}", file.read(stop - start))

    def _document(self, name: str, line: bytes) -> Document:
        if not line.strip():
            return Document(name, b"", "empty")
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Document(name, b"", "encoding")
        except (ValueError, RecursionError):
            return Document(name, b"", "broken_json")
        return record_document(name, record, self.field, self.largest_document)


class JsonLines:
    """A source with one document a line of JSON.

    Lines are read here and not by `datasets`, whose reader gives up the whole file at the first broken line.

    Args:
        files: (name, path) of each file, in the order of the corpus.
        field: name of the field that holds the text.
    """

    def __init__(self, files: list[tuple[str, Path]], field: str, description: dict[str, str], largest_document: int):
        self.files, self.field, self.largest_document = files, field, largest_document
        self.description = {**description, "field": field}
        self.offsets = [_line_offsets(path) for _, path in files]
        self.first = np.cumsum([0] + [len(offsets) - 1 for offsets in self.offsets])

    def __len__(self) -> int:
        return int(self.first[-1])

    def name(self, index: int) -> str:
        """File and line, counted from 1."""
        file = int(np.searchsorted(self.first, index, side="right")) - 1
        return f"{self.files[file][0]}:{index - self.first[file] + 1}"

    def part(self, start: int, stop: int) -> JsonLinesPart:
        """Lines ``start`` up to, not including, ``stop``."""
        pieces = []
        for (name, path), offsets, first in zip(self.files, self.offsets, self.first[:-1].tolist(), strict=True):
            low, high = max(start - first, 0), min(stop - first, len(offsets) - 1)
            if low < high:
                pieces.append((path, name, low, offsets[low : high + 1].tolist()))
        return JsonLinesPart(pieces, self.field, self.largest_document)


def _line_offsets(path: Path) -> np.ndarray:
    """Where each line of a file starts, and the file's size, int64."""
    starts, position = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(_SCAN_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
            position += len(block)
    offsets = np.concatenate(starts)
    return offsets if offsets[-1] == position else np.append(offsets, position)


@dataclass(frozen=True)
class DatasetPart:
    """A range of records of a data set; see `DatasetDocuments`."""

    dataset: Any
    start: int
    field: str
    largest_document: int

    def documents(self) -> Iterator[Document]:
        """One document a record."""
        for row, record in enumerate(self.dataset, start=self.start):
            yield record_document(f"row {row}", record, self.field, self.largest_document)


class DatasetDocuments:
    """A source with one document a record of a `datasets.Dataset`."""

    def __init__(self, dataset: Dataset, field: str, description: dict[str, str], largest_document: int):
        if field not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise InputError(description["from"], f"has no field {field!r}; it has {columns}", "choose one with --field")
        self.dataset = dataset.select_columns([field])
        self.field, self.largest_document = field, largest_document
        self.description = {**description, "field": field}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Number of the record, counted from 0."""
        return f"row {index}"

    def part(self, start: int, stop: int) -> DatasetPart:
        """Records ``start`` up to, not including, ``stop``."""
        return DatasetPart(self.dataset.select(range(start, stop)), start, self.field, self.largest_document)


def load_parquet(
    files: list[tuple[str, Path]], field: str, description: dict[str, str], largest_document: int
) -> DatasetDocuments:
    """Parquet files as one source; `datasets` keeps a memory-mapped copy in its cache."""
    paths = [str(path) for _, path in files]
    dataset = _load("parquet", description["from"], data_files=paths, split="train")
    return DatasetDocuments(dataset, field, description, largest_document)


def load_hub(name: str, subset: str | None, split: str, field: str, largest_document: int) -> DatasetDocuments:
    """A split of any data set that `datasets` can load without running code from it."""
    description = {"kind": "dataset", "from": name, "subset": subset or "", "split": split}
    return DatasetDocuments(_load(name, name, name=subset, split=split), field, description, largest_document)


def _load(path: str, place: str, **arguments: Any) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(path, **arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        remedy = "check the name, --subset and --split, the files, and the network"
        raise InputError(place, f"`datasets` cannot load it: {error}", remedy) from error
