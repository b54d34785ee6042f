"""Packing: sequences, labels, positions and documents, against a plain loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config.errors import InputError
from megascale.data.batches import IGNORED, SequenceSet
from megascale.data.corpus import Split


def line_of(lengths: list[int], separated: bool, gap: int = 0) -> Split:
    """Documents of these lengths with ids 1, 2, ...; with a gap, they do not lie next to each other in the file."""
    starts = np.cumsum(lengths) - lengths
    shifts = np.arange(1, len(lengths) + 1) * gap if gap else None
    file = np.full(sum(lengths) + gap * (len(lengths) + 1), 9999, np.int64)
    count = 1
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        file[start + gap * (number + 1) :][:length] = np.arange(count, count + length)
        count += length
    return Split("line", file, starts.astype(np.int64), shifts, sum(lengths), separated)


def by_hand(lengths: list[int], separated: bool, sequence: int, size: int) -> list[tuple[int, int, int, int]]:
    """(token, label, position, document) along one sequence."""
    owner = [document for document, length in enumerate(lengths) for _ in range(length)]
    result: list[tuple[int, int, int, int]] = []
    position = 0
    for at in range(sequence * size, (sequence + 1) * size):
        if at >= len(owner):
            position += 1
            result.append((len(owner), IGNORED, position - 1, result[-1][3]))
            continue
        if at > sequence * size and owner[at] != owner[at - 1]:
            position = 0
        inside = at + 1 < len(owner) and (separated or owner[at + 1] == owner[at])
        result.append((at + 1, at + 2 if inside else IGNORED, position, owner[at] - owner[sequence * size]))
        position += 1
    return result


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 3]),
)
def test_sequences_equal_a_plain_loop(lengths: list[int], size: int, separated: bool, padded: bool, gap: int):
    sequences = SequenceSet("line", line_of(lengths, separated, gap), size, "document", 1000, padded)
    labels = sum(lengths) - 1
    assert len(sequences) == (-(-labels // size) if padded else labels // size)
    batch = sequences.sequences(range(len(sequences)))
    for row in range(len(sequences)):
        got = zip(
            *(tensor[row].tolist() for tensor in (batch.tokens, batch.labels, batch.positions, batch.documents)), strict=True
        )
        assert list(got) == by_hand(lengths, separated, row, size)
    if padded and separated:
        learned = batch.labels[batch.labels != IGNORED].tolist()
        assert learned == list(range(2, sum(lengths) + 1)), "every token but the first is scored exactly once"
    assert batch.loss_tokens == int((batch.labels != IGNORED).sum())


def test_causal_attention_makes_one_document_of_a_sequence():
    batch = SequenceSet("line", line_of([3, 4, 5], True), 11, "causal", 1000, False).sequences([0])
    assert batch.positions[0].tolist() == list(range(11))
    assert batch.documents[0].tolist() == [0] * 11


def test_types_are_those_of_torch_embeddings():
    batch = SequenceSet("line", line_of([30], True), 4, "document", 1000, False).sequences([0, 3])
    kinds = [str(tensor.dtype) for tensor in (batch.tokens, batch.labels, batch.positions, batch.documents)]
    assert kinds == ["torch.int64", "torch.int64", "torch.int64", "torch.int32"]
    assert batch.tokens.shape == (2, 4)


def test_an_id_outside_the_vocabulary_is_named_with_its_place():
    sequences = SequenceSet("line", line_of([30], True), 4, "document", 20, False)
    sequences.sequences([0, 1, 2, 3])
    with pytest.raises(InputError, match=r"line, token 19 of the split: id 20 is outside the vocabulary of 20"):
        sequences.sequences([4])


def test_a_sequence_that_is_not_there_is_refused():
    with pytest.raises(IndexError, match="sequences 0 to 6"):
        SequenceSet("line", line_of([30], True), 4, "document", 1000, False).sequences([7])
