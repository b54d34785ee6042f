"""Sample order: which sequence of which source is the i-th one trained on.

Everything here is a pure function of its arguments, in integer arithmetic of our own: no state, no cost to start anywhere, and no
change with the version of a random generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

_ROUNDS = 6
_SHARE_BITS = 24


def scramble(values: np.ndarray) -> np.ndarray:
    """A fixed one-to-one scrambling of 64-bit numbers (the finaliser of splitmix64); uint64, shape as given."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: np.ndarray, count: int, key: str) -> np.ndarray:
    """Where a random permutation of 0 .. count-1, chosen by the key, sends the indices; int64 [n].

    A Feistel network permutes the numbers of an even number of bits; results that are too large are sent through it again
    until they fit. Needs no memory for the permutation, which may be of billions.

    Args:
        indices: integers in [0, count), [n].
    """
    half = (max(count - 1, 1).bit_length() + 1) // 2
    keys = [xxhash.xxh3_64_intdigest(f"{key}/{number}".encode()) for number in range(_ROUNDS)]
    values = _feistel(indices.astype(np.uint64), half, keys)
    while (outside := values >= np.uint64(count)).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    """Permutes the numbers of 2 * half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (scramble(right ^ np.uint64(key)) & mask)
    return (left << bits) | right


def blend(indices: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which source each index of a blend draws from, and how many times that source was drawn from before.

    The first source takes every index at which its due share, rounded, grows by one; the others share what is left in the
    same way. So each source's count stays within one draw per source of its share, at any index.

    Args:
        indices: integers >= 0, below 2^40, [n].
        weights: of the sources, > 0.

    Returns:
        Source, int64 [n], and ordinal within the source, int64 [n].
    """
    left = indices.astype(np.int64)
    sources = np.full(len(left), len(weights) - 1, np.int64)
    ordinals = np.zeros(len(left), np.int64)
    open_ = np.ones(len(left), bool)
    for source, share in enumerate(_shares(weights)):
        before, after = _due(left, share), _due(left + 1, share)
        taken = open_ & (after > before)
        sources[taken], ordinals[taken] = source, before[taken]
        open_ &= ~taken
        left = left - before
    ordinals[open_] = left[open_]
    return sources, ordinals


def blend_counts(consumed: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `consumed` draws came from each source."""
    counts = []
    for share in _shares(weights):
        counts.append(int(_due(np.array(consumed), share)))
        consumed -= counts[-1]
    return [*counts, consumed]


def _shares(weights: Sequence[float]) -> list[int]:
    """Share of each source but the last among itself and those after it, in units of 2^-24."""
    rest = np.cumsum(np.array(weights, np.float64)[::-1])[::-1]
    return [max(1, int(weight / total * 2**_SHARE_BITS)) for weight, total in zip(weights[:-1], rest[:-1], strict=True)]


def _due(draws: np.ndarray, share: int) -> np.ndarray:
    """Share of the first `draws` draws, rounded, integers [n]."""
    return (draws * share + (1 << (_SHARE_BITS - 1))) >> _SHARE_BITS
