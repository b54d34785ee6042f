"""What general compressors make of the held-out text: the yardstick for bits per byte of a small model."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

from megascale.data.corpus import Split

PRIMING_BYTES = 128 << 20
"""Most training text that xz is primed with: its encoder needs about 11 times the dictionary in memory."""

_PRESET_9_DICTIONARY = 64 << 20
_LARGEST_DICTIONARY = 256 << 20
_DOCUMENTS = 256  # decoded at a time


def bits_per_byte(held_out: bytes, training: bytes) -> dict[str, float]:
    """Compressed size of the held-out text in bits per byte, by compressor.

    ``gzip -9``; ``xz -9``; ``xz -9, primed``: by how much the compressed training text grows when the held-out text follows it,
    with a dictionary that holds both (up to 256 MiB). All run at the same time, in threads: both libraries work without the
    interpreter's lock.

    Args:
        held_out: not empty.
        training: may be empty.
    """
    both = training + held_out
    with ThreadPoolExecutor(4) as pool:
        primed, alone = (pool.submit(_xz_size, text, len(both)) for text in (both, training))
        xz, zipped = pool.submit(_xz_size, held_out, len(held_out)), pool.submit(gzip.compress, held_out, 9)
        sizes = {"gzip -9": len(zipped.result()), "xz -9": xz.result(), "xz -9, primed": primed.result() - alone.result()}
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}


def _xz_size(text: bytes, window: int) -> int:
    dictionary = min(max(window, _PRESET_9_DICTIONARY), _LARGEST_DICTIONARY)
    return len(lzma.compress(text, lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]))


def text_of(split: Split, tokenizer: Tokenizer, separator: int, limit: int | None = None) -> bytes:
    """The documents of a split, decoded and joined, as UTF-8.

    Args:
        separator: id between documents; it is no text.
        limit: stop at the document that reaches this many bytes; None: all of them.
    """
    parts: list[bytes] = []
    size = 0
    for text in _documents(split, tokenizer, separator):
        parts.append(text.encode("utf-8"))
        size += len(parts[-1])
        if limit is not None and size >= limit:
            break
    return b"".join(parts)


def _documents(split: Split, tokenizer: Tokenizer, separator: int) -> Iterator[str]:
    for first in range(0, len(split.starts), _DOCUMENTS):
        documents = (split.document(i) for i in range(first, min(first + _DOCUMENTS, len(split.starts))))
        ids = [document[document != separator].tolist() for document in documents]
        yield from tokenizer.decode_batch(ids, skip_special_tokens=False)
