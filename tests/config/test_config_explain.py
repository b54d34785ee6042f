"""Every wrong setting is named with its place, what was given, what is expected, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.errors import InputError
from megascale.config.explain import suggest
from megascale.config.fields import describe, field_at, setting_paths
from megascale.config.load import load_config
from megascale.config.spellings import OTHER_NAMES, SETTING_OF


def refusal(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_all_problems_are_listed_each_with_its_place(tmp_path: Path) -> None:
    text = refusal(tmp_path, "model:\n  width: '3'\n  heads: 0\nprecision: fp8\n", "schedule.steps=1.5")
    assert "4 problems" in text
    assert 'a.yaml:2: model.width: given "3"; expected an integer > 0' in text
    assert "a.yaml:3: model.heads: given 0; expected an integer > 0" in text
    assert 'a.yaml:4: precision: given "fp8"; expected one of fp32, bf16' in text
    assert "override 1: schedule.steps=1.5: schedule.steps: given 1.5; expected an integer > 0" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {layers: 1e3}", "model.layers: given 1000.0; expected an integer > 0 (L, number of layers); write 1000"),
        ("model: {qkv_bias: yes}", "write true"),
        ("model: {head_dim: x}", "expected an integer > 0, or null"),
        ("model: {streams: {smoothing: 1}}", "expected a number >= 0 and < 1"),
        ("model: {rotary: {scaling: yarm}}", "did you mean yarn?"),
        ("optimizer: {lr: 1e400}", "write a finite number"),
        ("optimizer: {betas: [0.1]}", "optimizer.betas.1: is missing; expected a number"),
        ("optimizer: {betas: 3}", "expected a list of 2, each a number"),
        ("optimizer: {betas: [0.1, x]}", 'optimizer.betas.1: given "x"; expected a number'),
        ("optimizer: {groups: [{lr_scale: 1}]}", "optimizer.groups.0.pattern: is missing; expected a text"),
        ("data: {sources: []}", "expected a list, each element a section with path, weight, at least 1"),
        ("model:", "model: is empty"),
        ("model: [1]", "model: given [1]; expected a section with vocab_size, width"),
        ("run: {name: a;b}", "of the form ^[A-Za-z0-9]"),
        ("compile: true", "compile: given true; expected one of auto, on, off"),
    ],
)
def test_wrong_values_say_what_is_expected(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


def test_a_broken_element_is_reported_once(tmp_path: Path) -> None:
    assert "1 problem " in refusal(tmp_path, "data: {sources: [{weight: 2}]}")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("model: {widht: 3}", "model.width"),
        ("model: {hidden_size: 3}", "model.width"),
        ("hidden_size: 3", "model.width"),
        ("model: {moe_router_topk: 2}", "model.experts.per_token"),
        ("model: {num_key_value_heads: 2}", "model.kv_heads"),
        ("parallel: {tensor-parallel-degree: 2}", "parallel.tp"),
        ("training: {steps: 3}", "schedule.steps"),
        ("training: {global_batch_size: 3}", "batch.sequences"),
        ("sequence_length: 3", "data.sequence_length"),
        ("smoothing: 0.1", "model.streams.smoothing"),
        ("BF16: true", "precision"),
        ("parscale_n: 2", "model.streams.count"),
        ("optimzer: {lr: 1}", "optimizer"),
    ],
)
def test_unknown_settings_say_what_was_probably_meant(tmp_path: Path, text: str, meant: str) -> None:
    assert f"did you mean {meant} (" in refusal(tmp_path, text).replace(f"did you mean {meant}?", f"did you mean {meant} (")


def test_an_unknown_setting_without_a_match_lists_the_section(tmp_path: Path) -> None:
    assert "unknown setting; validation has every, sequences" in refusal(tmp_path, "validation: {qqq: 1}")


def test_other_trainers_settings_that_do_not_exist_here_say_why(tmp_path: Path) -> None:
    assert "no dropout" in refusal(tmp_path, "model: {hidden_dropout: 0}")
    assert "never run" in refusal(tmp_path, "data: {trust_remote_code: true}")


def test_secrets_given_by_mistake_are_not_repeated(tmp_path: Path) -> None:
    assert "canary" not in refusal(tmp_path, "observe: {wandb: {api_key: canary}}")
    assert "canary" not in refusal(tmp_path, "foo: canary", "observe.wandb.api_key=canary")


def test_the_table_of_spellings_points_to_settings_that_exist() -> None:
    known = {".".join(path) for path in setting_paths()}
    assert set(OTHER_NAMES) <= known
    assert len(SETTING_OF) == sum(map(len, OTHER_NAMES.values())), "a spelling stands for two settings"
    assert not set(SETTING_OF) & known


@pytest.mark.parametrize("setting", list(setting_paths()), ids=".".join)
def test_every_setting_can_be_described_and_found_by_its_own_name(setting: tuple[str, ...]) -> None:
    field = field_at(setting)
    assert field is not None
    assert describe(field)
    assert len(setting) == 1 or suggest(("somewhere", setting[-1]))
