"""The training blend: exactly once in an epoch, pure, resumable anywhere."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megascale.data.batches import SequenceSet
from megascale.data.blend import Blend, BlendedSource
from megascale.data.corpus import Split


def source(name: str, tokens: int, weight: float, first: int, size: int = 4) -> BlendedSource:
    """One document with ids first, first + 1, ..."""
    split = Split(name, np.arange(first, first + tokens), np.zeros(1, np.int64), None, tokens, True)
    return BlendedSource(SequenceSet(name, split, size, "document", 1 << 20, False), weight, f"digest of {name}")


def small_blend(seed: int = 1) -> Blend:
    return Blend([source("a", 41, 3.0, 0), source("b", 29, 1.0, 1000)], seed)


def test_every_sequence_of_a_source_comes_once_in_each_epoch():
    found = small_blend().locate(range(400))
    for number, count in enumerate([10, 7]):
        mine = found.sources == number
        for epoch in range(3):
            assert sorted(found.sequences[mine & (found.epochs == epoch)].tolist()) == list(range(count))


def test_epochs_and_seeds_are_ordered_differently():
    one, other = Blend([source("a", 401, 1.0, 0)], 1), Blend([source("a", 401, 1.0, 0)], 2)
    first = one.locate(range(100)).sequences.tolist()
    assert first != one.locate(range(100, 200)).sequences.tolist()
    assert first != other.locate(range(100)).sequences.tolist()


def test_a_source_is_ordered_alike_alone_and_in_a_blend():
    found = small_blend().locate(range(40))
    alone = Blend([source("a", 41, 1.0, 0)], 1).locate(range(int((found.sources == 0).sum())))
    assert found.sequences[found.sources == 0].tolist() == alone.sequences.tolist()


@given(st.lists(st.integers(1, 17), min_size=1, max_size=8), st.integers(0, 10**7))
def test_batches_of_any_size_started_anywhere_give_the_same_sequences(sizes: list[int], start: int):
    blend = small_blend()
    together = blend.sequences(range(start, start + sum(sizes)))
    cut, pieces = start, []
    for size in sizes:
        # A blend opened anew, as after a resume.
        pieces.append(small_blend().sequences(range(cut, cut + size)))
        cut += size
    for name in ("tokens", "labels", "positions", "documents"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(piece, name) for piece in pieces]))


def test_ranks_read_disjoint_parts_of_one_batch():
    blend = small_blend()
    whole = blend.sequences(range(16))
    ranks = [blend.sequences(range(rank, 16, 4)) for rank in range(4)]
    assert torch.equal(whole.tokens, torch.stack([ranks[i % 4].tokens[i // 4] for i in range(16)]))


def test_rows_come_from_the_located_sequences():
    blend = small_blend()
    batch, found = blend.sequences(range(50)), blend.locate(range(50))
    expected = np.where(found.sources == 0, 0, 1000) + 4 * found.sequences
    assert batch.tokens[:, 0].tolist() == expected.tolist()
    assert torch.equal(batch.tokens + 1, batch.labels)


def test_progress_counts_epochs_and_shares():
    progress = small_blend().progress(400)
    assert progress == {"data/epoch/a": 30.0, "data/share/a": 0.75, "data/epoch/b": 100 / 7, "data/share/b": 0.25}
    assert small_blend().progress(0)["data/share/a"] == 0.0
