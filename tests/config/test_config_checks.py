"""Contradictory, unused and impossible settings are refused before anything starts; each case is the smallest that fails."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.inactive import ROUTER_ONLY, inactive
from megascale.config.load import LoadedConfig, load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config, Experts
from megascale.config.write import dump


def load(folder: Path, text: str, *overrides: str) -> LoadedConfig:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, text: str, world: int | None = None) -> str:
    loaded = load(folder, text)
    with pytest.raises(InputError) as caught:
        check(loaded, world)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_defaults_are_fine() -> None:
    assert check(LoadedConfig(Config())) == []
    assert check(LoadedConfig(Config()), world=8) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {width: 250}", "model.width: width 250 is not a multiple of heads 4; the nearest is 248 or 252"),
        ("model: {heads: 300}", "model.heads: width 256 is not a multiple of heads 300; the nearest is 300"),
        ("model: {heads: 6, width: 384, kv_heads: 4}", "heads 6 is not a multiple of kv_heads 4: 1, 2, 3, 6 are possible"),
        ("model: {head_dim: 63}", "model.head_dim: 63 is odd"),
        ("model: {width: 12}", "width 12 / heads 4 = 3 per head is odd"),
        ("model: {experts: {count: 2, per_token: 3}}", "a token cannot go to 3 of 2 experts"),
        ("model: {layers: 4, experts: {count: 2, every: 9, offset: 4}}", "beyond the 4 layers (from 0)"),
        ("model: {experts: {count: 2, every: 2, offset: 2}}", "offset 2 must be below every 2"),
        ("model: {rotary: {scaling: llama3, low_frequency_factor: 4}}", "must be below high_frequency_factor 4.0"),
        ("model: {rotary: {scaling: yarn, beta_slow: 32}}", "beta_slow 32.0 must be below beta_fast 32.0"),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1: given 1.0; expected a number >= 0 and < 1"),
        ("optimizer: {groups: [{pattern: a}, {pattern: a}]}", "optimizer.groups.1.pattern: a is the pattern of group 0 too"),
        ("schedule: {steps: 50}", "schedule.steps: warmup_steps 100 is more than steps 50"),
        ("schedule: {shape: wsd, decay_steps: 950}", "warmup_steps 100 + decay_steps 950 = 1050 is more than steps 1000"),
        ("schedule: {shape: wsd, warmup_steps: 900}", "warmup_steps 900 + decay_steps 200 = 1100 is more than steps 1000"),
        ("batch: {ramp: [{steps: 999, sequences: 8}, {steps: 1, sequences: 8}]}", "take 1000 steps, and the run has 1000"),
        (
            "batch: {micro_batches: 3}",
            "16 sequences / 3 micro-batches = 5.33, not a whole number; the nearest that works is 15 or 18",
        ),
        ("batch: {sequences: 4, micro_batches: 8}", "the nearest that works is 8"),
        ("batch: {micro_batches: 4, ramp: [{steps: 9, sequences: 6}]}", "batch.ramp.0.sequences: 6 sequences / 4 micro-batches"),
        ("profile: {steps: [5, 4]}", "expected [first, last] with 1 <= first <= last"),
        ("profile: {steps: [0, 4]}", "expected [first, last] with 1 <= first <= last"),
        ("profile: {steps: [5, 1001]}", "step 1001 is beyond the last step 1000"),
        ("data: {sources: [{path: a/b}, {path: a//b/}]}", "data.sources.1.path: a//b/ is source 0 too"),
        ("model: {experts: {count: 4, per_token: 4, router: rl_r}}", "there is nothing to choose; at most 3"),
        ("model: {width: 10000000}", "model.width: 4.8e+15 parameters are more than 1e+13"),
        ("model: {experts: {count: 100000000}}", "model.experts.count: 2.16e+14 parameters"),
        ("model: {vocab_size: 1000000000000}", "model.vocab_size: 5.12e+14 parameters"),
        ("model: {altup: {form: sequence, blocks: 2}}", "model.altup.form: sequence has one residual block, given 2"),
        ("model: {altup: {form: sequence}, layers: 2}", "leaves the first and the last layer as they are, and there are 2"),
        ("model: {altup: {form: sequence, stride: 512}}", "model.altup.stride: 512 keeps one token of a sequence; less than"),
        ("model: {altup: {form: sequence}, experts: {count: 4, router: rl_r}}", "routers would get no reward"),
        ("model: {altup: {form: sequence}}\nparallel: {tp: 2}", "parallel.tp: tp 2 would cut the sequence"),
        ("data: {sequence_length: 1000000000}", "the residual of one sequence is 1.02e+12 bytes"),
    ],
)
def test_contradictions_name_the_setting_and_the_arithmetic(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("model: {streams: {smoothing: 0.1}}", "model.streams.smoothing: has no effect: model.streams.count is 1"),
        ("model: {experts: {per_token: 1}}", "model.experts.per_token: has no effect: model.experts.count is 1"),
        ("model: {experts: {balance_loss: 0.5}}", "model.experts.balance_loss"),
        (
            "model: {experts: {count: 4, bias_rate: 0.001}}",
            "model.experts.bias_rate: has no effect: model.experts.router is softmax",
        ),
        ("model: {experts: {count: 4, router: s_base, balance_loss: 0.01}}", "model.experts.balance_loss: has no effect"),
        ("model: {experts: {count: 4, router: sigmoid, z_loss: 0.01}}", "model.experts.z_loss: has no effect"),
        ("model: {experts: {count: 4, router: rl_r, gate: softmax}}", "model.experts.gate: has no effect"),
        ("model: {experts: {count: 4, router: hash, policy_loss: 0.1}}", "model.experts.policy_loss: has no effect"),
        ("model: {experts: {count: 4, hash_map: random}}", "model.experts.hash_map: has no effect"),
        ("model: {experts: {count: 4, router: hash, scope: global}}", "model.experts.scope: has no effect"),
        ("model: {altup: {read: old}}", "model.altup.read: has no effect: model.altup.blocks is 1"),
        ("model: {altup: {form: wide}}", "model.altup.form: has no effect: model.altup.blocks is 1"),
        ("model: {altup: {blocks: 2, stride: 3}}", "model.altup.stride: has no effect: model.altup.form is recycled"),
        ("model: {altup: {form: sequence, read: old}}", "model.altup.read: has no effect: model.altup.form is sequence"),
        ("model: {rotary: {factor: 2}}", "model.rotary.factor: has no effect: model.rotary.scaling is none"),
        ("model: {rotary: {scaling: llama3, beta_fast: 32}}", "model.rotary.beta_fast: has no effect"),
        ("model: {rotary: {scaling: yarn, low_frequency_factor: 1}}", "model.rotary.low_frequency_factor: has no effect"),
        ("optimizer: {muon: {lr: 0.02}}", "optimizer.muon: has no effect: optimizer.name is adamw"),
        ("optimizer: {muon: {}}", "optimizer.muon: has no effect"),
        ("optimizer: {groups: [{pattern: a, frozen: true, lr_scale: 1}]}", "optimizer.groups.0.lr_scale: has no effect"),
        ("schedule: {decay_steps: 5}", "schedule.decay_steps: has no effect: schedule.shape is cosine"),
        ("schedule: {shape: constant, final_lr: 0.1}", "schedule.final_lr: has no effect"),
        ("validation: {every: 0, sequences: 64}", "validation.sequences: has no effect"),
        ("checkpoint: {every: 0, keep_last: 2}", "checkpoint.keep_last: has no effect"),
        ("profile: {memory: false}", "profile.memory: has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused_because_it_was_set_whatever_its_value(
    tmp_path: Path, text: str, setting: str
) -> None:
    assert f"a.yaml:1: {setting}" in refusal(tmp_path, text)


def test_an_override_takes_back_what_a_file_set(tmp_path: Path) -> None:
    text = "model: {experts: {count: 8, per_token: 2}}\noptimizer: {name: muon, muon: {lr: 0.1}}\n"
    (warning,) = check(load(tmp_path, text, "model.experts.count=1"))
    assert "override model.experts={} takes back" in warning
    assert check(load(tmp_path, text, "model.experts={}", "optimizer.name=adamw", "optimizer.muon=null")) == []


@pytest.mark.parametrize("router", get_args(Experts.model_fields["router"].annotation))
def test_every_router_takes_its_own_settings_and_a_saved_config_of_it_loads_again(tmp_path: Path, router: str) -> None:
    own = [f"model.experts.{name}={VALUES[name]}" for name, routers in ROUTER_ONLY.items() if router in routers]
    loaded = load(tmp_path, f"model: {{experts: {{count: 4, capacity_factor: 1.0, router: {router}}}}}", *own)
    assert check(loaded) == []
    again = load(tmp_path, dump(resolve(loaded.config)))
    assert check(again) == []
    assert resolve(again.config) == resolve(loaded.config)


VALUES = {"balance_loss": 0.5, "z_loss": 0.5, "bias_rate": 0.5, "sinkhorn_iterations": 3, "sinkhorn_tolerance": 0.5}
VALUES |= {"gate": "sigmoid", "policy_loss": 0.5, "baseline_loss": 0.5, "entropy_bonus": 0.5, "hash_map": "modulo"}


def test_settings_without_effect_exist() -> None:
    for path in inactive(Config()):
        current: object = Config()
        for key in path:
            current = getattr(current, str(key))


def test_all_problems_come_at_once_each_at_the_line_that_caused_it(tmp_path: Path) -> None:
    text = refusal(tmp_path, "schedule:\n  steps: 50\nmodel:\n  heads: 3\nparallel:\n  stream: 2\n")
    assert "3 problems" in text
    assert "a.yaml:2: schedule.steps" in text
    assert "a.yaml:4: model.heads" in text
    assert "a.yaml:6: parallel.stream" in text


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("model: {sliding_window: 512}", "model.sliding_window: 512 has no effect: sequences have 512 tokens"),
        ("model: {rotary: {scaling: yarn}}", "model.rotary.factor: 1 leaves the frequencies"),
        ("model: {altup: {blocks: 4}, experts: {count: 4, every: 2}}", "routed layers read only 2 of the 4 blocks"),
        ("model: {altup: {blocks: 2}, experts: {count: 4, every: 2}}", "routed layers read only 1 of the 2 blocks"),
        ("model: {altup: {blocks: 2}, experts: {count: 4, every: 2}}", "with model.altup.select=by_period they take turns"),
        ("model: {altup: {blocks: 2, select: by_period}}", "by_period is alternating: model.experts.every is 1"),
        ("checkpoint: {every: 4, keep_every: 6}", "6 is not a multiple of every 4"),
    ],
)
def test_doubtful_settings_are_warned_about(tmp_path: Path, text: str, warning: str) -> None:
    warnings = check(load(tmp_path, text))
    assert len(warnings) == 1
    assert warning in warnings[0]
    assert warnings[0].startswith(f"{tmp_path}/a.yaml:1: ")


@pytest.mark.parametrize(
    "text",
    [
        "model: {sliding_window: 511}",
        "model: {altup: {blocks: 2, select: same}, experts: {count: 4, every: 2}}",
        "model: {altup: {blocks: 2}, experts: {count: 4, every: 3}}",
        "model: {altup: {blocks: 2, select: by_period, form: wide, coefficients: token}, experts: {count: 4, every: 2}}",
        "model: {altup: {form: sequence, stride: 8}}\nparallel: {pp: 2}\nbatch: {micro_batches: 2}",
        "model: {experts: {count: 4, per_token: 4, every: 4, offset: 3}}",
        "schedule: {steps: 100, warmup_steps: 100}",
        "schedule: {shape: wsd, warmup_steps: 800, decay_steps: 200}",
        "optimizer: {betas: [0, 0.999]}",
        "checkpoint: {every: 4, keep_every: 8}",
        "profile: {steps: [1, 1000]}",
    ],
)
def test_what_is_at_the_edge_but_fine_passes_in_silence(tmp_path: Path, text: str) -> None:
    assert check(load(tmp_path, text)) == []


def test_settings_of_a_part_that_an_override_switched_off_are_only_mentioned(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("validation: {every: 10, sequences: 32}\n")
    (warning,) = check(load_config(path, ["validation.every=0"]))
    assert "validation.sequences: has no effect" in warning and "run.yaml:1" in warning
    with pytest.raises(InputError, match=r"validation\.sequences: has no effect"):
        check(load_config(path, ["validation.every=0", "validation.sequences=8"]))
