"""What may be passed through to DeepSpeed, and what may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.checks import check
from megascale.config.engine import OURS
from megascale.config.errors import InputError
from megascale.config.fields import setting_paths
from megascale.config.load import LoadedConfig, load_config


def load(folder: Path, text: str, *overrides: str) -> LoadedConfig:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_what_deepspeed_alone_decides_is_passed_through(tmp_path: Path) -> None:
    text = "engine:\n  deepspeed:\n    wall_clock_breakdown: true\n    zero_optimization: {overlap_comm: false}\n"
    loaded = load(tmp_path, text, "engine.deepspeed.zero_optimization.reduce_bucket_size=1000")
    assert check(loaded, world=2) == []
    assert loaded.config.engine.deepspeed == {
        "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000},
    }


@pytest.mark.parametrize("key", OURS)
def test_a_key_that_megascale_sets_itself_is_refused_with_our_setting(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError) as caught:
        check(load(tmp_path, f"engine:\n  deepspeed:\n    {key}: 1\n"), world=2)
    assert f"a.yaml:3: engine.deepspeed.{key}: megascale sets this itself, from {OURS[key]}; remove it" in str(caught.value)


def test_the_settings_named_instead_exist() -> None:
    known = {".".join(path) for path in setting_paths()}
    assert {name for names in OURS.values() for name in names.split(" and ")} <= known


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{zero_optimization: {stage: 2}}", "zero_optimization.stage: megascale sets this itself, from parallel.zero_stage"),
        ("{zero_optimization: {offload_optimizer: {device: cpu}}}", "zero_optimization.offload_optimizer: not tested"),
        (
            "{zero_optimization: {reduce_scatter: false}}",
            "zero_optimization.reduce_scatter: megascale's engine depends on its own",
        ),
        ("{communication_data_type: fp16}", "communication_data_type: megascale sets this itself, from precision"),
        ("{zero_optimization: {cpu_offload: true}}", "zero_optimization.cpu_offload: not tested"),
        ("{zero_optimization: {round_robin_gradients: true}}", "zero_optimization.round_robin_gradients: not tested"),
        ("{zero_optimization: {zero_hpz_partition_size: 2}}", "zero_optimization.zero_hpz_partition_size: not tested"),
        ("{zero_optimization: {mics_shard_size: 2}}", "zero_optimization.mics_shard_size: not tested"),
        ("{zero_optimization: true}", "zero_optimization: expected a section"),
        ("{prescale_gradients: true}", "prescale_gradients: gradients are summed over ranks"),
    ],
)
def test_what_is_untested_or_changes_the_gradients_is_refused(tmp_path: Path, settings: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        check(load(tmp_path, f"engine: {{deepspeed: {settings}}}"), world=2)
    assert f"a.yaml:1: engine.deepspeed.{reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "world", "reason"),
    [
        ("parallel: {zero_stage: 0}", 1, "has no effect: parallel.zero_stage is 0"),
        (
            "parallel: {tp: 2}",
            2,
            "has no effect: one data-parallel rank runs without DeepSpeed; remove it, or set parallel.zero_stage",
        ),
    ],
)
def test_settings_of_deepspeed_are_refused_where_it_does_not_run(
    tmp_path: Path, text: str, world: int | None, reason: str
) -> None:
    loaded = load(tmp_path, text + "\nengine: {deepspeed: {wall_clock_breakdown: true}}")
    with pytest.raises(InputError) as caught:
        check(loaded, world)
    assert "1 problem in the config" in str(caught.value)
    assert f"a.yaml:2: engine.deepspeed: {reason}" in str(caught.value)
    assert check(load(tmp_path, text + "\nengine: {deepspeed: {}}"), world) == []
