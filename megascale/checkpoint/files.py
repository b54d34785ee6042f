"""Durable files: written once, digested on the way, on the disk when the call returns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

BLOCK = 2 * 2**20  # bytes; large enough to keep the disk busy, small enough to stay in the cache between digest and write


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3-128 digest (32 hex digits) of a file's content."""

    size: int
    digest: str


def digest_bytes(content: bytes) -> str:
    """xxh3-128 of some bytes, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_file(path: Path) -> FileRecord:
    """Size and digest of a file, read in blocks (the whole file is never in memory).

    Raises:
        OSError: the file cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def write_all(file: FileIO, block: memoryview) -> None:
    """Write a whole block: the system may take less than it is given (at most 2 GiB, or what is left of a disk)."""
    while len(block):
        block = block[file.write(block) :]


def write_file(path: Path, chunks: Iterable[memoryview]) -> FileRecord:
    """Write a new file and wait until it is on the disk.

    Args:
        path: a file that does not exist.
        chunks: its content, in order, as one-dimensional views of bytes; taken one by one, so a generator keeps one in memory.

    Returns:
        Size and digest of what was handed over (not of what the disk made of it: that is what the digest is for).

    Raises:
        OSError: the file exists, or cannot be written (a full disk).
    """
    digest, size = xxhash.xxh3_128(), 0
    with FileIO(path, "x") as file:
        for chunk in chunks:
            for start in range(0, len(chunk), BLOCK):
                block = chunk[start : start + BLOCK]
                digest.update(block)
                write_all(file, block)
            size += len(chunk)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk (a rename or a new file is durable only then)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_json(content: object, indent: int | None = 1) -> bytes:
    """JSON as it is stored: sorted keys; the same content always gives the same bytes. indent None = all on one line.

    Raises:
        TypeError, ValueError: content that JSON cannot hold (NaN and infinities included).
    """
    return (json.dumps(content, indent=indent, sort_keys=True, allow_nan=False) + "\n").encode()
