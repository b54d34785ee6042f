"""Tokenizers: nothing is lost, special tokens in text are text, training is deterministic."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from megascale.config.errors import InputError
from megascale.data.tokenizer import (
    SEPARATOR,
    encode,
    load_tokenizer,
    separator_id,
    token_bytes,
    tokenizer_digest,
    train_tokenizer,
    vocabulary_size,
)


@pytest.fixture(scope="module")
def trained(corpus_folder: Path) -> Tokenizer:
    return load_tokenizer(corpus_folder / "tokenizer.json")


@given(text=st.text())
def test_any_text_decodes_to_itself_and_its_bytes_are_counted(trained: Tokenizer, text: str):
    for spelled in (text, text + SEPARATOR + text):
        ids = encode(trained, [spelled])[0]
        assert trained.decode(ids, skip_special_tokens=False) == spelled
        assert separator_id(trained) not in ids
        sizes = token_bytes(trained, 500)
        assert sizes is not None
        assert sizes[ids].sum() == len(spelled.encode())


def test_the_separator_has_id_0_and_no_bytes(trained: Tokenizer):
    sizes = token_bytes(trained, 500)
    assert sizes is not None
    assert separator_id(trained) == 0
    assert sizes[0] == 0
    assert sizes.shape == (500,)
    assert (sizes[vocabulary_size(trained) :] == 0).all()


def test_digits_are_cut_by_three_and_indentation_stays_whole():
    tokenizer = train_tokenizer(["    if x:\n        return 1234567\n"] * 50, 400)
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("if x:\n        return 1234567")]
    assert pieces == ["if", "Ġx", ":Ċ" + "Ġ" * 8, "return", "Ġ", "123", "456", "7"]


def test_training_twice_gives_the_same_tokenizer(texts: Path):
    content = [path.read_text() for path in sorted(texts.iterdir())]
    assert train_tokenizer(content, 380).to_str() == train_tokenizer(content, 380).to_str()


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer(["text"], 256)


def test_the_digest_ignores_layout_and_truncation(trained: Tokenizer, tmp_path: Path):
    one, other, different = (tmp_path / f"{name}.json" for name in ("one", "other", "different"))
    one.write_text(trained.to_str(pretty=False))
    truncated = load_tokenizer(one)
    truncated.enable_truncation(7)
    other.write_text(truncated.to_str(pretty=True))
    assert tokenizer_digest(one) == tokenizer_digest(other)
    assert len(encode(load_tokenizer(other), ["1 2 3 4 5 6 7 8 9 10 11"])[0]) > 7
    different.write_text(trained.to_str().replace(SEPARATOR, "<|other|>"))
    assert tokenizer_digest(one) != tokenizer_digest(different)


def word_level(*specials: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def test_foreign_tokenizers_use_their_own_separator():
    assert separator_id(word_level("</s>")) == 3
    assert separator_id(word_level("<stop>", "</s>"), "<stop>") == 3
    with pytest.raises(InputError, match="name one with --separator; it has the special tokens <stop>"):
        separator_id(word_level("<stop>"))
    with pytest.raises(InputError, match="no token '<begin>'"):
        separator_id(word_level("</s>"), "<begin>")


def test_bytes_are_not_counted_where_text_is_lost():
    assert token_bytes(word_level(), 3) is None


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="there is no tokenizer file"):
        load_tokenizer(path)
    for content in ("not json", "{}"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
            load_tokenizer(path)
