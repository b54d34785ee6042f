"""Tokenizers: byte-level BPE trained on the corpus, or any Hugging Face tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megascale.config.errors import InputError
from megascale.data.digests import value_digest

SEPARATOR = "<|endoftext|>"
SMALLEST_VOCABULARY = 257

# Words with one character before them, up to three digits, punctuation, and a line break with the indentation after it;
# punctuation takes the line break along. On the standard library at 4096 ids: 3.71 bytes a token; the GPT-2 pattern
# has 3.36 and the GPT-4 pattern, which parts line break and indentation, 3.47.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"

_FOREIGN_SEPARATORS = (
    "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<s>", "<eos>", "<bos>", "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "[EOS]", "[BOS]", "[SEP]",
)  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same tokenizer.

    Every byte has an id, so any text can be encoded and decodes to itself. `SEPARATOR` has id 0.

    Args:
        vocab_size: number of ids, with the separator and the 256 bytes; small corpora may give fewer.

    Raises:
        InputError: fewer ids than the separator and all bytes need.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        remedy = f"ask for at least {SMALLEST_VOCABULARY}"
        raise InputError("--vocab-size", f"{vocab_size} ids cannot hold the separator and the 256 bytes", remedy)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer.json, made ready for text that may spell special tokens: they are encoded as plain text.

    Raises:
        InputError: no such file, or not a tokenizer.
    """
    if not path.is_file():
        raise InputError(str(path), "there is no tokenizer file", "give the path of a Hugging Face tokenizer.json")
    try:
        return _prepare(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise InputError(str(path), f"cannot be read: {error}", "give the path of a Hugging Face tokenizer.json") from error
    except Exception as error:  # `tokenizers` raises bare Exception for content it does not know.
        raise InputError(str(path), f"is not a tokenizer: {error}", "give the path of a Hugging Face tokenizer.json") from error


def _prepare(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without separators or other special tokens around it."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest id, plus one; ids of foreign tokenizers may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_digest(path: Path) -> str:
    """Digest of a tokenizer.json that ignores its layout and the settings for truncation and padding."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return value_digest({key: value for key, value in content.items() if key not in ("truncation", "padding")})


def separator_id(tokenizer: Tokenizer, separator: str | None = None) -> int:
    """Id of the token that starts each document.

    Args:
        separator: the token to use; None: the tokenizer's end-of-text or beginning-of-text token.

    Raises:
        InputError: the tokenizer does not have it, or has none of the usual ones.
    """
    if separator is not None:
        found = tokenizer.token_to_id(separator)
        if found is None:
            raise InputError("--separator", f"the tokenizer has no token {separator!r}", f"it has {_specials(tokenizer)}")
        return found
    for name in _FOREIGN_SEPARATORS:
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise InputError(
        "--tokenizer", "it has none of the usual end-of-text tokens", f"name one with --separator; it has {_specials(tokenizer)}"
    )


def _specials(tokenizer: Tokenizer) -> str:
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return "the special tokens " + " ".join(names) if names else "no special tokens"


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """Bytes of text that each id stands for, int32 [vocab_size]; 0 for special tokens and unused ids.

    None for tokenizers that do not keep all of the text (WordPiece, for example): bytes cannot be counted from their ids.
    """
    content = json.loads(tokenizer.to_str())
    kinds = {kind for key in ("pre_tokenizer", "decoder", "normalizer") for kind in _component_types(content.get(key))}
    byte_level = "ByteLevel" in kinds
    if not byte_level and not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return None
    sizes = np.zeros(vocab_size, np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        sizes[index] = len(token) if byte_level else _sentencepiece_bytes(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


def _component_types(component: object) -> list[str]:
    """Types of a serialised component and of those nested in it."""
    if isinstance(component, dict):
        own = [component["type"]] if isinstance(component.get("type"), str) else []
        return own + [kind for value in component.values() for kind in _component_types(value)]
    if isinstance(component, list):
        return [kind for value in component for kind in _component_types(value)]
    return []


def _sentencepiece_bytes(token: str) -> int:
    return 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("\u2581", " ").encode())
