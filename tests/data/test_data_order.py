"""The sample order is a permutation in each epoch, a blend keeps its shares, and both depend on their arguments only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.data.order import blend, blend_counts, permute


@given(st.integers(1, 3000), st.text(max_size=8))
def test_a_permutation_takes_every_number_once(count: int, key: str):
    assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


@given(st.integers(1, 10**12), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_permutation_can_be_asked_anywhere(count: int, asked: list[int]):
    indices = np.array([index % count for index in asked])
    together = permute(indices, count, "key")
    assert ((together >= 0) & (together < count)).all()
    assert together.tolist() == [int(permute(indices[i : i + 1], count, "key")[0]) for i in range(len(indices))]


def test_the_order_stays_as_it_is():
    # A change here changes the data of every run that is resumed.
    assert permute(np.arange(10), 10, "1/digest/0").tolist() == [9, 2, 5, 3, 6, 4, 7, 1, 0, 8]


def test_a_permutation_mixes_well():
    count, keys = 7, 3000
    places = np.zeros((count, count))
    for key in range(keys):
        places[np.arange(count), permute(np.arange(count), count, str(key))] += 1
    assert np.abs(places / keys - 1 / count).max() < 0.03
    order = permute(np.arange(100_000), 100_000, "large")
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10**9))
def test_a_blend_numbers_the_draws_of_each_source_without_gaps(weights: list[float], start: int):
    indices = np.arange(start, start + 200)
    sources, ordinals = blend(indices, weights)
    before, after = blend_counts(start, weights), blend_counts(start + 200, weights)
    assert sum(after) == start + 200
    for source in range(len(weights)):
        assert ordinals[sources == source].tolist() == list(range(before[source], after[source]))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(1, 10**6))
def test_a_blend_keeps_its_shares_at_any_index(weights: list[float], consumed: int):
    due = np.array(weights) / sum(weights) * consumed
    assert np.abs(np.array(blend_counts(consumed, weights)) - due).max() <= len(weights) + 1


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0]])
def test_a_blend_is_even_over_short_stretches(weights: list[float]):
    sources, _ = blend(np.arange(64), weights)
    for start in range(0, 64, 8):
        assert np.bincount(sources[start : start + 8]).tolist() == [int(8 * weight / sum(weights)) for weight in weights]
