"""Megatron-LM's indexed data sets, written here byte by byte, are read in place."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config.errors import InputError
from megascale.config.schema import Data, Source
from megascale.data.batches import IGNORED
from megascale.data.megatron import open_megatron
from megascale.data.open_data import open_data

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_pair(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> str:
    """Documents of sequences of ids, as Megatron-LM's IndexedDatasetBuilder lays them out."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    borders = np.cumsum([0] + [len(document) for document in documents], dtype=np.int64)
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    header += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(borders))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    return str(prefix)


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 200), max_size=5), max_size=3), min_size=1, max_size=8)


@given(documents=DOCUMENTS, dtype=st.sampled_from(sorted(CODES)), fraction=st.sampled_from([0.0, 0.3]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents, dtype: str, fraction: float):
    corpus = open_megatron(write_pair(tmp_path_factory.mktemp("pair") / "corpus", documents, dtype), fraction)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    flat = [document for document in flat if document]
    read = [split.document(index).tolist() for split in (corpus.train, corpus.validation) for index in range(len(split.starts))]
    assert sorted(read) == sorted(flat)
    if fraction == 0:
        assert read == flat
        assert corpus.train.tokens(0, 10**6).tolist() == [token for document in flat for token in document]
    elif len(flat) > 1:
        assert len(corpus.validation.starts)
    assert corpus.largest_id == max((max(document) for document in flat), default=0)


def test_the_first_token_of_a_document_is_not_predicted_from_the_one_before(tmp_path: Path):
    path = write_pair(tmp_path / "c", [[[1, 2, 9]], [[3, 4], [5, 9]], [[6, 7, 8, 9]]])
    data = open_data(Data(sources=(Source(path=path),), sequence_length=10, validation_fraction=0.0), 1, 10)
    batch = data.train.sequences([0])
    assert batch.tokens[0].tolist() == [1, 2, 9, 3, 4, 5, 9, 6, 7, 8]
    assert batch.labels[0].tolist() == [2, 9, IGNORED, 4, 5, 9, IGNORED, 7, 8, 9]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert data.tokenizer is None
    assert data.token_bytes is None
    assert data.validation == {}


def test_held_out_documents_stay_the_same(tmp_path: Path):
    path = write_pair(tmp_path / "c", [[[number] * 3] for number in range(200)])
    held_out = open_megatron(path, 0.1).validation
    assert 10 <= len(held_out.starts) <= 35
    # A larger share only adds documents.
    assert set(held_out.tokens(0, 10**6).tolist()) < set(open_megatron(path, 0.5).validation.tokens(0, 10**6).tolist())


def damage(path: Path, start: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[start : start + len(content)] = content
    path.write_bytes(raw)


def test_damaged_pairs_are_refused(tmp_path: Path):
    def fresh(name: str) -> str:
        return write_pair(tmp_path / name, [[[1, 2]], [[3, 4, 5]]])

    cases = {
        "magic": (0, b"X", "not a Megatron index"),
        "version": (9, b"\2", "not a Megatron index"),
        "float": (17, b"\6", "type code 6"),
        "count": (18, b"\xff", "truncated"),
        "lengths": (34, b"\5", "do not lie one after the other"),
        "borders": (34 + 24, b"\1", "do not cover its sequences"),
    }
    for name, (start, content, message) in cases.items():
        path = fresh(name)
        damage(Path(f"{path}.idx"), start, content)
        with pytest.raises(InputError, match=message):
            open_megatron(path, 0.0)
    path = fresh("short")
    Path(f"{path}.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(InputError, match=r"short\.bin: the file is truncated: 4 of 10 bytes"):
        open_megatron(path, 0.0)
    Path(f"{path}.bin").unlink()
    with pytest.raises(InputError, match=r"short\.bin: the file is missing"):
        open_megatron(path, 0.0)
    path = fresh("index")
    Path(f"{path}.idx").write_bytes(b"MMID")
    with pytest.raises(InputError, match="the index is truncated"):
        open_megatron(path, 0.0)


def test_negative_ids_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="negative id -1"):
        open_megatron(write_pair(tmp_path / "c", [[[1, -1]]], "int32"), 0.0)
