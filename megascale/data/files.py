"""Documents that are whole files: text, source code, and this machine's Python standard library."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megascale.config.errors import InputError
from megascale.data.documents import Document, checked_document

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst"})
CODE_SUFFIXES = frozenset(
    [
        ".py",
        ".pyi",
        ".pyx",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hh",
        ".hpp",
        ".cu",
        ".cuh",
        ".go",
        ".rs",
        ".java",
        ".kt",
        ".scala",
        ".js",
        ".jsx",
        ".mjs",
        ".ts",
        ".tsx",
        ".rb",
        ".php",
        ".pl",
        ".lua",
        ".r",
        ".jl",
        ".m",
        ".swift",
        ".cs",
        ".fs",
        ".hs",
        ".ml",
        ".ex",
        ".exs",
        ".erl",
        ".clj",
        ".sh",
        ".bash",
        ".zig",
        ".sql",
        ".html",
        ".css",
        ".scss",
        ".yaml",
        ".yml",
        ".toml",
        ".cmake",
    ]
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})


@dataclass(frozen=True)
class FilePart:
    """A range of files; see `FileDocuments`."""

    files: list[tuple[str, Path]]
    largest_document: int

    def documents(self) -> Iterator[Document]:
        """One document a file."""
        for name, path in self.files:
            yield _read_file(name, path, self.largest_document)


class FileDocuments:
    """A source with one document a file.

    Args:
        files: (name, path) of each file, in the order of the corpus.
        description: what the manifest tells about the source.
        largest_document: larger files are bad documents, bytes.
    """

    def __init__(self, files: list[tuple[str, Path]], description: dict[str, str], largest_document: int):
        self.files, self.description, self.largest_document = files, description, largest_document

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Path of the file below the folder that was asked for."""
        return self.files[index][0]

    def part(self, start: int, stop: int) -> FilePart:
        """Files ``start`` up to, not including, ``stop``."""
        return FilePart(self.files[start:stop], self.largest_document)


def _read_file(name: str, path: Path, largest_document: int) -> Document:
    try:
        if path.stat().st_size > largest_document:
            return Document(name, b"", "too_large")
        return checked_document(name, path.read_bytes(), largest_document)
    except OSError:
        return Document(name, b"", "unreadable")


def find_files(roots: Iterable[Path], suffixes: frozenset[str] | None) -> list[tuple[str, Path]]:
    """Names and paths of all files below the roots with one of the suffixes (None: all), sorted by name.

    The order depends on names below the roots only, not on where the roots lie. A root that is a file is always taken.
    Hidden folders, installed packages and links to folders are not entered.

    Raises:
        InputError: a root does not exist.
    """
    found: dict[str, Path] = {}
    for root in roots:
        if not root.exists():
            raise InputError(str(root), "there is no such file or folder", "check the paths given with --from")
        for path in [root] if root.is_file() else _walk(root, suffixes):
            name = path.name if root.is_file() else path.relative_to(root).as_posix()
            # Two roots may hold files of the same name; the later one is told apart by its root.
            found[name if name not in found else f"{root.as_posix()}/{name}"] = path
    return sorted(found.items())


def _walk(root: Path, suffixes: frozenset[str] | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        for name in sorted(names):
            if suffixes is None or Path(name).suffix.lower() in suffixes:
                yield Path(folder, name)


def standard_library(largest_document: int) -> FileDocuments:
    """The Python files of the standard library of the running Python: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Files that record how this Python was built differ between machines with the same library.
    files = [(name, path) for name, path in find_files([root], frozenset({".py"})) if not _is_build_record(name)]
    description = {"kind": "stdlib", "from": f"standard library of Python {platform.python_version()}"}
    return FileDocuments(files, description, largest_document)


def _is_build_record(name: str) -> bool:
    return name.startswith(("_sysconfigdata", "config-"))
