"""The manifest of a corpus folder: what it holds, and size and digest of each file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megascale.config.errors import InputError
from megascale.data.digests import file_digest, value_digest

Dtype = Literal["uint16", "uint32"]
FILE_NAME = "manifest.json"
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")
PREPARE_AGAIN = "remove the folder and make it again: {command}"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitCounts(_Record):
    """Contents of one split; `bytes` of UTF-8 text, without separators."""

    tokens: int
    documents: int
    bytes: int


class FileRecord(_Record):
    """Size in bytes and xxh3-128 of a file."""

    bytes: int
    digest: str


class BadDocument(_Record):
    """A document that was left out."""

    name: str
    problem: str


class Manifest(_Record):
    """Everything a reader needs to know before it opens the token files.

    Attributes:
        recipe: digest of source, split and tokenizer settings: equal recipes give equal corpora.
        dtype: type of the ids in `*.tokens`, little endian.
        separator: the token each document starts with, and `separator_id` its id.
        largest_id: largest id in the corpus.
        bad_documents: number by kind; `bad_names` lists the first of them.
        duplicates: documents dropped because an earlier one has the same text.
    """

    format: Literal["megascale-corpus"] = "megascale-corpus"
    version: Literal[1] = 1
    recipe: str
    source: dict[str, str]
    dtype: Dtype
    vocab_size: int
    separator: str
    separator_id: int
    largest_id: int
    tokenizer_digest: str
    splits: dict[Literal["train", "validation"], SplitCounts]
    bad_documents: dict[str, int]
    bad_names: list[BadDocument]
    duplicates: int
    files: dict[str, FileRecord]

    def content_digest(self) -> str:
        """Digest of tokens, documents and tokenizer: what training depends on."""
        return value_digest({name: record.digest for name, record in self.files.items()})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest with a digest of itself."""
    content = manifest.model_dump()
    (folder / FILE_NAME).write_text(json.dumps({**content, "digest": value_digest(content)}, indent=1, ensure_ascii=True) + "\n")


def prepare_command(folder: Path) -> str:
    """The command that makes a corpus folder."""
    return f"megascale prepare {folder.name if folder.parent == Path('data') else folder}"


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a corpus folder and checks it against its own digest.

    Raises:
        InputError: no folder, no manifest, or a damaged one.
    """
    if not folder.is_dir():
        raise InputError(str(folder), "there is no such corpus", f"make it: {prepare_command(folder)}")
    path, remedy = folder / FILE_NAME, PREPARE_AGAIN.format(command=prepare_command(folder))
    try:
        content = json.loads(path.read_text())
        digest = content.pop("digest", None) if isinstance(content, dict) else None
        manifest = Manifest.model_validate(content)
    except FileNotFoundError as error:
        raise InputError(str(path), "the corpus has no manifest", remedy) from error
    except (ValidationError, ValueError) as error:
        raise InputError(str(path), f"the manifest is damaged: {error}", remedy) from error
    if digest != value_digest(content):
        raise InputError(str(path), "the manifest is damaged: its digest does not fit", remedy)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that all files are there with their full size.

    Raises:
        InputError: names the first file that is missing, cut short or too long.
    """
    remedy = PREPARE_AGAIN.format(command=prepare_command(folder))
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(str(path), "the file is missing", remedy)
        if (size := path.stat().st_size) != record.bytes:
            state = "truncated" if size < record.bytes else "too long"
            raise InputError(str(path), f"the file is {state}: {size} of {record.bytes} bytes", remedy)


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the files that are missing or whose digest differs; reads all of them."""
    return [
        name
        for name, record in manifest.files.items()
        if not (folder / name).is_file() or file_digest(folder / name) != record.digest
    ]
