"""Documents and the sources they come from: one interface for files, records and data sets."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Problem = Literal["", "empty", "too_large", "binary", "encoding", "broken_json", "missing_field", "unreadable"]
PROBLEMS: tuple[Problem, ...] = ("", "empty", "too_large", "binary", "encoding", "broken_json", "missing_field", "unreadable")


@dataclass(frozen=True)
class Document:
    """One document of a source.

    Attributes:
        name: how a user finds it again, for example ``email/parser.py`` or ``a.jsonl:12``.
        content: its text as UTF-8 bytes; empty when there is a problem.
        problem: why it cannot be used; empty for a good document.
    """

    name: str
    content: bytes
    problem: Problem = ""


class Part(Protocol):
    """A contiguous range of a source's documents, light enough to be sent to a worker process."""

    def documents(self) -> Iterator[Document]:
        """The documents of the range, in order."""


class DocumentSource(Protocol):
    """A finite, ordered collection of documents."""

    description: dict[str, str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of a document, without reading it."""

    def part(self, start: int, stop: int) -> Part:
        """Documents ``start`` up to, not including, ``stop``."""


def checked_document(name: str, raw: bytes, largest_document: int) -> Document:
    """Wraps bytes that should be UTF-8 text; finds what makes them unusable.

    Args:
        largest_document: size limit in bytes.
    """
    if len(raw) > largest_document:
        return Document(name, b"", "too_large")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        return Document(name, b"", "empty")
    if b"\0" in raw:
        return Document(name, b"", "binary")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return Document(name, b"", "encoding")
    return Document(name, raw)
