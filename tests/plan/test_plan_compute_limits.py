"""The two predictions of the law that only compute counts, with what denies them and the limit that binds."""

import json

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.laws.registry import law_named
from megascale.plan.axis_search import Limits
from megascale.plan.cluster import load_cluster
from megascale.plan.compute_limits import compute_only_lines, compute_only_report

GIB = 2**30


def report(flops=1e22, memory=24 * GIB, unique=np.inf, latency=np.inf):
    return compute_only_report(flops, load_cluster("a100"), Limits(memory, latency, unique), draws=0)


def test_one_budget_is_one_quality_whatever_the_size():
    rows = report()["equal_quality"]
    assert max(row["N"] for row in rows) > 50 * min(row["N"] for row in rows)
    bits = [row["bits_per_character"] for row in rows]
    assert max(bits) - min(bits) < 0.01  # attention and small models' heads are not in N D
    served = [row["serving_flops_per_token"] for row in rows]
    assert served == sorted(served)


def test_the_laws_of_both_terms_deny_it_far_from_their_optimum():
    rows = report()["equal_quality"]
    shares = [row["compute_share"]["besiroglu"] for row in rows]
    assert max(shares) > 0.95 and shares[0] < 0.1 and shares[-1] < 0.6


def test_without_a_limit_of_data_only_the_range_of_the_law_stops_it():
    binds = report()["binds"]
    assert binds["limit"] == "range of the law"
    assert binds["N"] >= law_named("compute-only").variables["N"].low


def test_a_limit_of_data_binds_and_gives_the_smallest_size():
    binds = report(unique=2e11)["binds"]
    assert binds["limit"] == "data" and binds["D"] <= 2e11
    assert report(unique=4e11)["binds"]["N"] < binds["N"]


def test_data_and_deployment_may_contradict():
    binds = report(unique=1e11)["binds"]
    assert binds["N"] is None and "deployment" in binds["limit"]


def test_with_capped_data_n_must_grow_by_the_gap():
    capped = report(unique=1e11)["capped"]
    assert capped["needed_parameters"] == pytest.approx(capped["gap"] * capped["reached_by"]["N"])
    assert capped["gap"] > 1.3
    assert capped["reachable_by"]["besiroglu"] > capped["needed_parameters"]  # that law asks for more than N D


def test_the_largest_shape_has_as_many_tokens_as_parameters():
    facts = report(flops=1e19, memory=70 * GIB, unique=1e9)
    base = facts["capped"]["reached_by"]
    assert base["D"] == 1e9 and 0.5e9 < base["N"] < 1.3e9
    assert facts["binds"]["N"] is None and facts["binds"]["limit"] == "data, against the budget"


def test_the_largest_shape_and_the_offers_keep_the_latency():
    fast, slow = (report(unique=1e11, latency=latency)["capped"] for latency in (2e-3, np.inf))
    assert fast["reached_by"]["N"] < 0.5 * slow["reached_by"]["N"]
    offers = {offer["axis"]: offer for offer in fast["offers"]}
    assert offers["P=8"]["latency_seconds"] > 2e-3 and offers["P=8"]["over"] == ["latency"]
    assert offers["4 epochs"]["over"] == [] and slow["offers"][0]["over"] == ["memory"]
    assert "over the latency" in "\n".join(compute_only_lines(report(unique=1e11, latency=2e-3)))


def test_too_few_tokens_cannot_be_made_up_by_any_size():
    assert report(unique=2e9)["capped"]["reachable_by"]["chinchilla"] is None


def test_the_other_axes_are_offered_beside_growth():
    offers = {offer["axis"]: offer for offer in report(unique=1e11)["capped"]["offers"]}
    assert offers["P=8"]["high"] == pytest.approx(
        float(law_named("parscale-stack").predict("stream_parameters_ratio", {"P": 8.0}))
    )
    assert offers["K=2"]["high"] == 1
    assert 3.5 < offers["4 epochs"]["low"] < 4 and offers["16 epochs"]["low"] < 12
    assert offers["E=128"]["low"] > 1.3


def test_it_is_told_as_text_and_json():
    for unique in (np.inf, 1e11):
        facts = report(unique=unique)
        json.dumps(facts, allow_nan=False)
        text = "\n".join(compute_only_lines(facts))
        assert "no interior optimum" in text and "binds:" in text and "(b)" in text


@pytest.mark.parametrize(
    ("limits", "place"),
    [
        ({"unique": -5.0}, "--unique"),
        ({"unique": np.nan}, "--unique"),
        ({"latency": -1.0}, "--latency"),
        ({"latency": 1e-6}, "--latency"),
        ({"memory": np.nan}, "--memory"),
    ],
)
def test_senseless_limits_are_refused_as_by_the_search(limits, place):
    with pytest.raises(InputError) as refused:
        report(**limits)
    assert refused.value.place == place and refused.value.remedy


def test_impossible_requests_are_refused():
    with pytest.raises(InputError, match="--flops"):
        report(flops=-1.0)
    with pytest.raises(InputError, match="--memory"):
        report(memory=1e6)
