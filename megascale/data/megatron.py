"""Megatron-LM's indexed data sets (MMIDIDX, a `.bin` and an `.idx` file), read in place.

The index holds, little endian: 9 bytes ``MMIDIDX\\0\\0``, version (uint64, 1), code of the ids' type (uint8), number of
sequences (uint64), number of document borders (uint64), length of each sequence in tokens (int32), place of each sequence
in the `.bin` file in bytes (int64), and the first sequence of each document, with the number of sequences at the end (int64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megascale.config.errors import InputError
from megascale.data.corpus import Corpus, Split, map_file
from megascale.data.order import scramble

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LOOKED_AT = 1 << 24
_LOOKS = 64
_REMEDY = "copy the pair again, or build it again with Megatron-LM's tools/preprocess_data.py"


@dataclass(frozen=True)
class _Index:
    """Contents of an `.idx` file: type of the ids, and start and length of each document in tokens, int64 [N]."""

    dtype: np.dtype
    starts: np.ndarray
    lengths: np.ndarray


def is_megatron(path: str) -> bool:
    """Whether one of PATH.bin and PATH.idx is there."""
    return Path(f"{path}.bin").is_file() or Path(f"{path}.idx").is_file()


def open_megatron(path: str, validation_fraction: float) -> Corpus:
    """Opens the pair PATH.bin, PATH.idx.

    Args:
        validation_fraction: share of the documents held out, chosen by a hash of their number.

    Raises:
        InputError: one of the two is missing, truncated, or not of this format.
    """
    binary, index = Path(f"{path}.bin"), Path(f"{path}.idx")
    for file in (binary, index):
        if not file.is_file():
            raise InputError(str(file), "the file is missing", "a Megatron corpus needs both PATH.bin and PATH.idx")
    content = _read_index(index, binary)
    ids = map_file(binary, content.dtype)
    held_out = _held_out(len(content.starts), validation_fraction)
    whole = xxhash.xxh3_128(map_file(index, np.dtype("u1")).data)
    # The whole token file would take too long to read: its size and the ids that are looked at stand for it.
    looked_at = _look(ids)
    whole.update(looked_at.tobytes() + str(len(ids)).encode())
    if looked_at.min(initial=0) < 0:
        raise InputError(str(binary), f"holds the negative id {looked_at.min()}", _REMEDY)
    return Corpus(
        path=path,
        name=Path(path).name,
        digest=whole.hexdigest(),
        vocab_size=None,
        largest_id=int(looked_at.max(initial=0)),
        tokenizer=None,
        tokenizer_digest=None,
        train=_split(str(binary), ids, content, ~held_out),
        validation=_split(str(binary), ids, content, held_out),
    )


def _read_index(path: Path, binary: Path) -> _Index:
    raw = map_file(path, np.dtype("u1"))
    if len(raw) < _HEADER.size:
        raise InputError(str(path), "the index is truncated", _REMEDY)
    magic, version, code, sequences, borders = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1:
        raise InputError(str(path), "is not a Megatron index of version 1", _REMEDY)
    if code not in _DTYPES:
        raise InputError(str(path), f"ids of type code {code} are no integers", _REMEDY)
    if len(raw) < _HEADER.size + 12 * sequences + 8 * borders:
        raise InputError(str(path), "the index is truncated", _REMEDY)
    dtype = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(raw, "<i4", sequences, _HEADER.size).astype(np.int64)
    places = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    firsts = np.frombuffer(raw, "<i8", borders, _HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths)
    if (places != (ends - lengths) * dtype.itemsize).any():
        raise InputError(str(path), "its sequences do not lie one after the other", _REMEDY)
    if not borders or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise InputError(str(path), "its documents do not cover its sequences in order", _REMEDY)
    needed = int(ends[-1] if sequences else 0) * dtype.itemsize
    if (size := binary.stat().st_size) < needed:
        raise InputError(str(binary), f"the file is truncated: {size} of {needed} bytes", _REMEDY)
    bounds = np.concatenate([np.zeros(1, np.int64), ends])[firsts]
    document_lengths = np.diff(bounds)
    return _Index(dtype, bounds[:-1][document_lengths > 0], document_lengths[document_lengths > 0])


def _held_out(documents: int, fraction: float) -> np.ndarray:
    """Which documents are for validation, bool [documents]; at least one of several where a share is asked for."""
    scores = scramble(np.arange(documents, dtype=np.uint64))
    held_out = scores < np.uint64(fraction * 2**64)
    if fraction > 0 and documents > 1 and not held_out.any():
        held_out[np.argmin(scores)] = True
    return held_out


def _look(ids: np.ndarray) -> np.ndarray:
    """All ids of a small file; of a large one, evenly spaced runs."""
    if len(ids) <= _LOOKED_AT:
        return np.ascontiguousarray(ids)
    run = _LOOKED_AT // _LOOKS
    starts = np.linspace(0, len(ids) - run, _LOOKS).astype(np.int64)
    return np.concatenate([ids[start : start + run] for start in starts])


def _split(place: str, ids: np.ndarray, content: _Index, chosen: np.ndarray) -> Split:
    lengths = content.lengths[chosen]
    starts = np.cumsum(lengths) - lengths
    return Split(place, ids, starts, content.starts[chosen] - starts, int(lengths.sum()), starts_with_separator=False)
