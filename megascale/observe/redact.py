"""Removes secrets from settings before they are written or sent anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset({"key", "keys", "apikey", "token", "secret", "secrets", "password", "passwords", "passwd"})
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def is_secret_name(name: str) -> bool:
    """Whether a word of the name says secret: `WANDB_API_KEY`, `authToken`; but not `prefix_tokens`, `tokenizer`."""
    return any(word.lower() in _SECRET_WORDS for word in _WORD.findall(name))


def redact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings without secrets.

    Text under a secret name becomes "[redacted]", at any depth; so do the credentials of a URL anywhere.
    Numbers stay: `experts.per_token: 2` is a count, and secrets are text.
    """
    return {name: _redact(value, is_secret_name(name)) for name, value in settings.items()}


def _redact(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _redact(inner, secret or is_secret_name(str(name))) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(inner, secret) for inner in value]
    if isinstance(value, str):
        return REDACTED if secret else _URL_CREDENTIALS.sub(REDACTED + "@", value)
    return value
