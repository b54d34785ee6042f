"""`megascale plan axes`: arguments in, lines or JSON out, nothing read and ignored."""

import argparse
import json
from pathlib import Path

import pytest

from megascale.commands import plan_axes
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.model.accounting import parameters
from megascale.plan.cluster import load_cluster
from megascale.plan.layouts import search

QUICK = ("--streams", "1,2", "--experts", "1", "--blocks", "1", "--draws", "0")


def parsed(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpus")
    parser.add_argument("--weak", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("overrides", nargs="*")
    plan_axes.add_arguments(parser)
    return parser.parse_args([*given] if "--cluster" in given else [*given, "--cluster", "a100"])


def test_lines_and_json_tell_the_same(capsys):
    given = ("--flops", "1e20", "--memory", "4GiB", *QUICK)
    assert plan_axes.run(parsed(*given)) == 0
    text = capsys.readouterr().out
    assert plan_axes.run(parsed(*given, "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["budget"]["flops"] == 1e20 and facts["limits"]["memory"] == 4 * 2**30
    assert all(row["name"] in text for row in facts["designs"])


def test_a_budget_in_gpu_hours_is_one_in_flops():
    facts = plan_axes.facts_of(parsed("--gpu-hours", "100", "--achieved", "4e14", "--memory", "4GB", *QUICK))
    assert facts["budget"]["flops"] == pytest.approx(100 * 3600 * 4e14)
    assert facts["limits"]["memory"] == 4e9


def test_the_device_gives_the_memory_that_is_not_given():
    facts = plan_axes.facts_of(parsed("--flops", "1e20", *QUICK))
    assert facts["limits"]["memory"] == pytest.approx(83.4e9)


def test_compute_only_answers_by_the_law():
    given = parsed("--flops", "1e22", "--memory", "24GiB", "--law", "compute-only", "--draws", "0")
    lines = list(plan_axes.lines_of(plan_axes.facts_of(given), given))
    assert "2404.19484" in lines[0]


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (("--memory", "4GiB"), "--flops"),
        (("--flops", "1e20", "--gpu-hours", "5"), "--flops"),
        (("--flops", "1e20", "--achieved", "1e14"), "--achieved"),
        (("--gpu-hours", "5"), "--achieved"),
        (("--flops", "1e20", "--memory", "24x"), "--memory"),
        (("--flops", "1e20", "--memory", "200GiB"), "--memory"),
        (("--flops", "1e20", "--streams", "1,two"), "--streams"),
        (("--flops", "1e20", "--experts", "0"), "--experts"),
        (("--flops", "1e20", "--blocks-worth", "2"), "--blocks-worth"),
        (("--flops", "1e20", "--context", "0"), "--context"),
        (("--flops", "1e20", "--draws", "-1"), "--draws"),
        (("--flops", "1e20", "--gpus", "8"), "--gpus"),
        (("axes", "model.width=64", "--flops", "1e20"), "model.width=64"),
        (("--flops", "1e20", "--json", "--details", "2"), "--details"),
        (("--flops", "1e20", "--law", "compute-only", "--served", "1e12"), "--served"),
        (("--flops", "1e20", "--law", "compute-only", "--plot", "folder"), "--plot"),
        (("--flops", "1e20", "--law", "compute-only", "--write", "run.yaml"), "--write"),
        (("--flops", "1e20", "--design", "512x4 P1 E1 k1 K1"), "--design"),
        (("--flops", "1e20", *QUICK, "--write", "run.yaml", "--design", "dense"), "--design"),
        (("--flops", "1e20", "--weak"), "--weak"),
        (("--flops", "1e20", "--cluster", "abacus"), "cluster abacus"),
    ],
)
def test_senseless_or_unread_arguments_are_refused(given, place):
    with pytest.raises(InputError) as refused:
        plan_axes.facts_of(parsed(*given))
    assert refused.value.place == place and refused.value.remedy


def test_pictures_are_made_where_they_are_asked_for(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("megascale.plan.axis_plots.plot_axes", lambda *given: drawn.append(given) or [tmp_path / "one.png"])
    given = ("--flops", "1e20", "--memory", "4GiB", *QUICK, "--json")
    assert "curves" not in plan_axes.facts_of(parsed(*given))
    assert plan_axes.run(parsed(*given, "--plot", str(tmp_path))) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    ((curves, iso, folder),) = drawn
    assert folder == tmp_path and printed.err == f"wrote {tmp_path / 'one.png'}\n"
    assert facts["curves"] == json.loads(json.dumps(curves)) and facts["iso_loss"] == json.loads(json.dumps(iso))


def test_the_written_run_is_the_best_design_with_its_tokens(tmp_path):
    """It passes all checks, and the planner of layouts takes it."""
    given = ("--flops", "1e20", "--memory", "4GiB", *QUICK)
    assert plan_axes.run(parsed(*given, "--write", str(tmp_path / "run.yaml"))) == 0
    best = plan_axes.facts_of(parsed(*given))["designs"][0]
    loaded = load_config(tmp_path / "run.yaml")
    check(loaded)
    config = resolve(loaded.config)
    assert config.run.name == best["name"].replace(" ", "-")
    assert parameters(config.model).total == best["parameters"]
    tokens = config.schedule.steps * config.batch.sequences * config.data.sequence_length
    assert best["D"] <= tokens < best["D"] * 1.001
    assert search(config, load_cluster("h100"), 8).found


def test_another_design_is_written_by_its_name(tmp_path):
    given = ("--flops", "1e20", "--memory", "4GiB", *QUICK, "--stream-share", "0.1")
    names = [row["name"] for row in plan_axes.facts_of(parsed(*given))["front"]]
    streams = next(name for name in names if "P2" in name)
    assert plan_axes.run(parsed(*given, "--write", str(tmp_path / "run.yaml"), "--design", streams)) == 0
    loaded = load_config(tmp_path / "run.yaml")
    check(loaded)
    phases = loaded.config.schedule.phases
    assert [phase.streams for phase in phases] == [1, None], "streams in the last tenth of the tokens"
    assert phases[1].steps == pytest.approx(0.1 * sum(phase.steps for phase in phases), rel=0.01)


def test_options_of_the_axes_are_refused_without_them():
    plan_axes.refuse_axis_options(parsed())
    with pytest.raises(InputError, match="plan axes"):
        plan_axes.refuse_axis_options(parsed("--flops", "1e20"))
