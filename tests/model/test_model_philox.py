"""Counter-based random numbers: the published answers, and a pure function of what each token is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megascale.model.exchange import identity
from megascale.model.origin import Draw, origin_of
from megascale.model.philox import philox, uniform

ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and words of philox4x32-10 in kat_vectors of the Random123 library."""


def words(text: str) -> list[Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), ANSWERS)
def test_the_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox(tuple(words(counter)), tuple(words(key))) == tuple(words(expected))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_the_generator_is_that_of_arbitrary_integers(numbers: list[int]) -> None:
    counter, key = list(numbers[:4]), list(numbers[4:])
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0], second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    found = philox(tuple(torch.tensor(n) for n in numbers[:4]), tuple(torch.tensor(n) for n in numbers[4:]))
    assert [int(word) for word in found] == counter


def draws(tokens: Tensor, draw: Draw, layer: int = 0, streams: int = 2, number: int = 5) -> Tensor:
    return origin_of(tokens, draw, identity).at(layer).draws(streams, number)


TOKENS = torch.zeros(6, 8, dtype=torch.int64)


def test_a_share_of_the_texts_draws_what_the_whole_does() -> None:
    whole = draws(TOKENS, Draw(seed=7, step=3))
    for first, stop in [(0, 2), (2, 3), (3, 6)]:
        part = draws(TOKENS[first:stop], Draw(seed=7, step=3, sample=first))
        assert torch.equal(part, whole[first * 8 : stop * 8])
    middle = origin_of(TOKENS, Draw(seed=7, step=3), lambda x: x[10:20]).draws(2, 5)
    assert torch.equal(middle, whole[10:20])


def test_streams_and_draws_do_not_depend_on_how_many_there_are() -> None:
    few, many = (draws(TOKENS, Draw(), streams=streams, number=number) for streams, number in [(2, 3), (4, 9)])
    assert torch.equal(few, many[:, :2, :3])


def test_every_part_of_the_key_changes_every_number() -> None:
    one = draws(TOKENS, Draw(1, 2, 3), layer=4)
    for other in (Draw(2, 2, 3), Draw(1, 3, 3), Draw(1, 2, 9)):
        assert (draws(TOKENS, other, layer=4) != one).all()
    assert (draws(TOKENS, Draw(1, 2, 3), layer=5) != one).all()
    assert one.unique().numel() == one.numel()


def test_numbers_are_uniform_and_uncorrelated() -> None:
    found = draws(torch.zeros(64, 128, dtype=torch.int64), Draw(), streams=4, number=4)
    assert (found >= 0).all() and (found < 1).all()
    counts = torch.histc(found.float(), 64, 0, 1)
    mean = found.numel() / 64
    assert (counts - mean).square().sum() / mean < 63 + 5 * (2 * 63) ** 0.5  # chi^2
    correlation = torch.corrcoef(found.flatten(1).T) - torch.eye(16)
    assert correlation.abs().max() < 5 / found.shape[0] ** 0.5


def test_the_ends_of_the_interval() -> None:
    assert uniform(torch.tensor(0)) == 0
    assert uniform(torch.tensor(2**32 - 1)) == 1 - 2**-24


def test_compiled_and_meta() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(draws, backend="aot_eager")
    assert torch.equal(compiled(TOKENS, Draw(1, 2)), draws(TOKENS, Draw(1, 2)))
    assert draws(TOKENS.to("meta"), Draw()).shape == (48, 2, 5)
