"""`megascale plan axes`: arguments in, lines or JSON out, nothing read and ignored."""

import argparse
import json

import pytest

from megascale.commands import plan_axes
from megascale.config.errors import InputError

QUICK = ("--streams", "1,2", "--experts", "1", "--blocks", "1", "--draws", "0")


def parsed(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpus", type=int)
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
    lines = list(plan_axes.main_lines(parsed("--flops", "1e22", "--memory", "24GiB", "--law", "compute-only", "--draws", "0")))
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
        (("--flops", "1e20", "--cluster", "abacus"), "cluster abacus"),
    ],
)
def test_senseless_or_unread_arguments_are_refused(given, place):
    with pytest.raises(InputError) as refused:
        plan_axes.facts_of(parsed(*given))
    assert refused.value.place == place and refused.value.remedy


def test_options_of_the_axes_are_refused_without_them():
    plan_axes.refuse_axis_options(parsed())
    with pytest.raises(InputError, match="plan axes"):
        plan_axes.refuse_axis_options(parsed("--flops", "1e20"))
