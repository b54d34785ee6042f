"""Random numbers as a pure function of integers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

No state: what a token draws depends on its key and counter alone, not on ranks, call order or recomputation. Words of 32 bits are held in
int64 tensors and no product exceeds 2^48, so that nothing overflows on any device or compiler.
"""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a word times a constant."""
    low_part = x * (multiplier & 0xFFFF)
    sum_of_high = x * (multiplier >> 16) + (low_part >> 16)
    return sum_of_high >> 16, ((sum_of_high & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words of each counter of four words under a key of two; int64 tensors that broadcast, taken modulo 2^32."""
    a, b, c, d = (word & WORD for word in counter)
    first, second = (word & WORD for word in key)
    for _ in range(ROUNDS):
        high_a, low_a = _product(a, MULTIPLIERS[0])
        high_c, low_c = _product(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (first + KEY_STEPS[0]) & WORD, (second + KEY_STEPS[1]) & WORD
    return a, b, c, d


def uniform(word: Tensor) -> Tensor:
    """A number in [0, 1) of the upper 24 bits of a word, exact in fp32; returned as fp64."""
    return (word >> 8).double() * 2.0**-24
