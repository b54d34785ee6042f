"""The dashboard shows registered metrics only, covers all of them, and says which a run lacks."""

from __future__ import annotations

import argparse
import builtins
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from megascale.commands import dashboard as verb
from megascale.config.errors import InputError
from megascale.config.resolve import resolve
from megascale.config.schema import AltUp, Config, Experts, Model, Phase, Schedule, Streams, Validation
from megascale.model.routers import loss_weights
from megascale.observe.dashboard import SECTIONS, build_workspace, missing_panels, panel_metrics, run_features, workspace_json
from megascale.observe.metrics import METRICS
from megascale.observe.sinks import JsonlSink

GOLDEN = Path(__file__).parent / "golden" / "workspace.json"
PANELS = [panel for section in SECTIONS for panel in section.panels]
PATTERNS = {metric.name_pattern for metric in METRICS}
EVERYTHING = Config(
    model=Model(streams=Streams(count=2), experts=Experts(count=4), altup=AltUp(blocks=2)),
    validation=Validation(every=10),
    schedule=Schedule(phases=(Phase(steps=1, streams=1), Phase(steps=1))),
)
OTHER_ROUTERS = [Config(model=Model(experts=Experts(count=4, router=r, capacity_factor=1.0))) for r in ("s_base", "rl_r")]
LOGGED = {p.format(layer="03", p=1, source="stdlib", group="matrices") for p in PATTERNS}


def test_panels_use_registered_patterns_and_axes() -> None:
    assert {pattern for panel in PANELS for pattern in panel.metrics} <= PATTERNS
    assert {panel.x for panel in PANELS} == {"tokens", "flops_total", "step"}


def test_every_metric_but_the_axes_has_a_panel() -> None:
    assert PATTERNS - {pattern for panel in PANELS for pattern in panel.metrics} == {"step", "tokens", "flops_total"}


def test_titles_are_unique() -> None:
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def test_a_pattern_finds_its_metrics() -> None:
    panel = next(panel for panel in PANELS if panel.title == "Idle experts, by layer")
    names = ["moe/layer_11/idle_experts", "moe/layer_03/idle_experts", "moe/layer_03/load_entropy", "step"]
    assert panel_metrics(panel, names) == {panel.metrics[0]: ["moe/layer_03/idle_experts", "moe/layer_11/idle_experts"]}


def test_a_run_that_logs_everything_misses_nothing() -> None:
    assert missing_panels(LOGGED, run_features(EVERYTHING, on_accelerator=True, peak_known=True)) == []


@pytest.mark.parametrize("name", sorted(LOGGED))
def test_every_absent_metric_is_found_missing(name: str) -> None:
    features = frozenset[str]().union(
        *(run_features(c, gpu, True) for c in (EVERYTHING, *OTHER_ROUTERS) for gpu in (True, False))
    )
    assert missing_panels(LOGGED - {name}, features)


def test_a_plain_cpu_run_needs_no_metric_of_absent_features() -> None:
    features = run_features(Config(validation=Validation(every=0)), on_accelerator=False, peak_known=False)
    plain = {n for n in LOGGED if n.split("/")[0] not in ("moe", "streams", "altup", "val")}
    plain = {n for n in plain if not n.startswith("train/aux/")}
    plain -= {"perf/mfu", "perf/mfu_full", "perf/hfu", "memory/peak_gib"}
    assert features == {"cpu"}
    assert missing_panels(plain, features) == []
    assert missing_panels(plain - {"data/epoch/stdlib"}, features) == ["Data: Epoch of each source: data/epoch/{source}"]


def test_sequence_altup_has_a_gain_but_no_blocks_to_compare() -> None:
    config = Config(model=Model(altup=AltUp(form="sequence")), validation=Validation(every=0))
    features = run_features(config, on_accelerator=False, peak_known=False)
    assert features == {"cpu", "altup"}
    assert [line for line in missing_panels(LOGGED - {"altup/gain"}, features) if "AltUp" in line] == [
        "AltUp: Correction gain: altup/gain"
    ]


@pytest.mark.parametrize("router", get_args(Experts.model_fields["router"].annotation))
def test_a_routed_run_needs_the_metrics_of_its_router_only(router: str) -> None:
    config = Config(model=Model(experts=Experts(count=4, router=router)))
    logged = {f"train/aux/{name}" for name in loss_weights(resolve(config).model.experts)}
    logged |= {n for n in LOGGED if n.split("/")[0] not in ("moe", "streams", "altup") and not n.startswith("train/aux/")}
    logged |= {f"moe/layer_00/{name}" for name in ("load_max_over_mean", "load_entropy", "idle_experts")}
    logged |= {"moe/layer_00/residual"} if router == "s_base" else {"moe/layer_00/policy_noise"} if router == "rl_r" else set()
    assert missing_panels(logged, run_features(config, on_accelerator=True, peak_known=True)) == []
    extra = {f"moe/layer_00/{name}" for name in ("residual", "policy_noise")} | {
        f"train/aux/{name}" for name in ("balance", "policy")
    }
    for name in logged & extra:
        assert missing_panels(logged - {name}, run_features(config, on_accelerator=True, peak_known=True))


def without_random_ids(value: Any) -> Any:
    """The workspace's JSON without the random panel ids and without nulls."""
    if isinstance(value, dict):
        return {k: without_random_ids(v) for k, v in value.items() if k != "__id__" and v is not None}
    return [without_random_ids(v) for v in value] if isinstance(value, list) else value


def test_the_workspace_is_the_golden_one() -> None:
    """After a wanted change: `megascale dashboard show --workspace`, ids and nulls removed, is the new golden file."""
    pytest.importorskip("wandb_workspaces")
    assert without_random_ids(json.loads(workspace_json(build_workspace("e", "p")))) == json.loads(GOLDEN.read_text())


def test_the_golden_workspace_has_each_panel_with_its_axis() -> None:
    sections = json.loads(GOLDEN.read_text())["spec"]["section"]["panelBankConfig"]["sections"]
    shown = [(s["name"], p["config"]["chartTitle"], p["config"]["xAxis"]) for s in sections for p in s["panels"]]
    assert shown == [(section.title, panel.title, panel.x) for section in SECTIONS for panel in section.panels]


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(arguments))


def test_show_lists_what_a_run_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 1)
    sink.write({"step": 1, "tokens": 10, "train/lm_loss": 2.0})
    sink.write({"step": 2, "tokens": 20, "train/lm_loss": 1.0, "val/a/loss": 2.0})
    sink.close()
    assert call("show", "--run", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "val/{source}/loss  logged: val/a/loss" in text
    assert "train/grad_norm  not logged" in text
    assert call("show", "--run", str(tmp_path), "--json") == 0
    panels = json.loads(capsys.readouterr().out)
    assert len(panels) == len(PANELS)
    assert panels[0]["logged"] == {"train/lm_loss": ["train/lm_loss"]}


def test_show_without_a_run_and_with_an_absent_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show") == 0
    assert "logged" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        call("show", "--run", str(tmp_path))


def test_show_workspace_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert call("show", "--workspace", "--entity", "team") == 0
    assert json.loads(capsys.readouterr().out)["entity"] == "team"


def test_push_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    with pytest.raises(InputError, match="wandb login"):
        call("push", "--entity", "e", "--project", "p")


@pytest.mark.parametrize("arguments", [("show", "--workspace"), ("push", "--entity", "e", "--project", "p")])
def test_the_absent_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    original = builtins.__import__

    def without_package(name: str, *args: Any, **keywords: Any) -> Any:
        if name.startswith("wandb_workspaces"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_package)
    with pytest.raises(InputError, match=r"megascale\[dashboard\]"):
        call(*arguments)
