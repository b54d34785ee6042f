"""From the arguments of `megascale prepare` to a source of documents."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megascale.config.errors import InputError
from megascale.data.documents import DocumentSource
from megascale.data.files import CODE_SUFFIXES, TEXT_SUFFIXES, FileDocuments, find_files, standard_library
from megascale.data.records import JsonLines, load_hub, load_parquet

Format = Literal["text", "code", "jsonl", "parquet"]
SUFFIXES: dict[Format, frozenset[str]] = {
    "text": TEXT_SUFFIXES,
    "code": CODE_SUFFIXES,
    "jsonl": frozenset({".jsonl", ".ndjson"}),
    "parquet": frozenset({".parquet"}),
}


@dataclass(frozen=True)
class SourceRequest:
    """What to read. Neither paths nor a data set: the standard library of this Python.

    Attributes:
        paths: files and folders.
        format: one of `SUFFIXES`, or ``auto``: by the suffixes that are found.
        dataset: name of a Hugging Face data set, with its subset and split.
        field: field of a record that holds the text.
        largest_document: larger documents are counted as bad, bytes.
    """

    paths: tuple[Path, ...] = ()
    format: Literal["auto", "text", "code", "jsonl", "parquet"] = "auto"
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    largest_document: int = 16 << 20


def open_source(request: SourceRequest) -> DocumentSource:
    """Opens the documents that are asked for.

    Raises:
        InputError: nothing there, several formats mixed, an unknown field, a data set that cannot be loaded.
    """
    if request.dataset is not None:
        if request.paths:
            raise InputError("--dataset", "given together with --from", "choose one of the two")
        return load_hub(request.dataset, request.subset, request.split, request.field, request.largest_document)
    if not request.paths:
        return standard_library(request.largest_document)
    kind = detect_format(request.paths) if request.format == "auto" else request.format
    files = find_files(request.paths, SUFFIXES[kind])
    place = " ".join(map(str, request.paths))
    if not files:
        raise InputError(place, f"no files of format {kind}", f"known suffixes: {' '.join(sorted(SUFFIXES[kind]))}")
    description = {"kind": kind, "from": place}
    if kind == "jsonl":
        return JsonLines(files, request.field, description, request.largest_document)
    if kind == "parquet":
        return load_parquet(files, request.field, description, request.largest_document)
    return FileDocuments(files, description, request.largest_document)


def detect_format(paths: tuple[Path, ...]) -> Format:
    """The format of the files below the paths; text and code count as one, the more frequent wins.
    Single files with unknown suffixes are text.

    Raises:
        InputError: record files lie beside others, or no known suffix is found.
    """
    counts: Counter[Format] = Counter()
    for name, _ in find_files(paths, None):
        suffix = Path(name).suffix.lower()
        counts.update(kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes)
    record_formats: tuple[Format, ...] = ("jsonl", "parquet")
    records = [kind for kind in record_formats if counts[kind]]
    place = " ".join(map(str, paths))
    if len(records) == 2 or (records and counts.total() > counts[records[0]]):
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        raise InputError(place, f"holds files of several formats: {found}", "choose one with --format")
    if records:
        return records[0]
    if not counts and not all(path.is_file() for path in paths):
        raise InputError(place, "no file has a known suffix", "give the files themselves instead of their folder")
    return "text" if counts["text"] >= counts["code"] else "code"
