"""Digests: xxh3-128, written as 32 hexadecimal digits. They find damage, they are no defence against forgery."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 22


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def value_digest(value: object) -> str:
    """Digest of a value made of JSON types, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())
