"""Secrets leave a config before it goes anywhere; counts of tokens stay."""

from __future__ import annotations

import pytest

from megascale.config.schema import Config
from megascale.observe.redact import redact


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "apiKey", "hf_token", "authToken", "client-secret", "password", "DB_PASSWD"])
def test_secret_names(name: str) -> None:
    assert redact({"a": {name: "canary"}, name: ["canary", {"x": "canary"}]}) == {
        "a": {name: "[redacted]"},
        name: ["[redacted]", {"x": "[redacted]"}],
    }


def test_names_that_only_look_secret_and_numbers_stay() -> None:
    settings = {"tokens": "1e9", "prefix_tokens": 48, "tokenizer": "a.json", "per_token": 2, "monkey": "x", "key_width": 64}
    assert redact(settings) == settings


def test_credentials_of_an_address_go() -> None:
    assert redact({"path": "s3://user:canary@host/a"}) == {"path": "s3://[redacted]@host/a"}


def test_the_default_config_is_unchanged() -> None:
    config = Config().model_dump(mode="json")
    assert redact(config) == config
