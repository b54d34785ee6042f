"""The search over axes: what it prints is the hypothesis evaluated with the registry's constants and the exact costs of real configs."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.config.schema import Streams
from megascale.laws.registry import law_named
from megascale.model import accounting
from megascale.plan.axis_candidates import Axes, Workload
from megascale.plan.axis_report import axis_report
from megascale.plan.axis_search import Limits, search_axes
from megascale.plan.axis_text import axis_lines
from megascale.plan.break_even import break_even
from megascale.plan.cluster import load_cluster
from megascale.plan.hypothesis import HYPOTHESIS, routed_factors
from megascale.plan.own_fits import Own

GIB = 2**30
BUDGET = 1e21
AXES = Axes(streams=(1, 4), experts=(1, 16), per_token=(1, 2), blocks=(1, 2))
WORK = Workload(sequence=2048, context=2048)
DENSE = Axes(streams=(1,), experts=(1,), per_token=(1,), blocks=(1,))


def search(flops=BUDGET, axes=AXES, draws=0, own=None, **limits):
    return search_axes(flops, load_cluster("a100"), Limits(**{"memory": 12 * GIB} | limits), axes, WORK, own, draws)


@pytest.fixture(scope="module")
def found():
    return search(draws=20)


def judged(found, name):
    return next(one for one in found.judged if one.base.name == name)


def index_of(found, **values):
    """The first candidate with these axes."""
    return next(
        i
        for i in range(len(found.table))
        if all(float(getattr(found.table.sizes, name)[i]) == value for name, value in values.items())
    )


def test_the_budget_is_spent_by_exact_counts(found):
    for one, tokens in zip(found.table.models, found.tokens, strict=True):
        counted = accounting.flops_per_token(one.model, (WORK.sequence + 1) / 2)
        assert tokens * counted == pytest.approx(BUDGET)
        assert one.total == accounting.parameters(one.model).total
        assert one.active == accounting.active_parameters(one.model)


def test_loss_is_the_hypothesis_with_the_constants_of_the_registry(found):
    at = index_of(found, streams=4, experts=16, per_token=1, blocks=1)
    one, law = judged(found, "besiroglu"), law_named("besiroglu").values
    effective = found.table.sizes.parameters[at] * one.ratio.middle[at]
    by_hand = law["E"] + law["A"] / effective ** law["alpha"] + law["B"] / found.tokens[at] ** law["beta"]
    assert one.loss[at] == pytest.approx(by_hand)


def test_n_eff_is_the_product_of_the_factors_of_streams_and_experts():
    found = search(draws=0)
    at = index_of(found, streams=4, experts=16, per_token=1, blocks=1)
    inner = found.table.sizes.non_embedding[[at]]
    streams = [
        float(law_named(name).predict("stream_parameters_ratio", {"P": 4.0})) for name in ("parscale-stack", "parscale-pile")
    ]
    routed = law_named("routed-hash").predict("routed_parameters_ratio", {"N": inner, "E": np.array([16.0])})[0]
    ratio = judged(found, "chinchilla").ratio
    assert ratio.low[at] == pytest.approx(min(streams) * routed)
    assert ratio.middle[at] == pytest.approx(np.sqrt(ratio.low[at] * ratio.high[at]))
    assert judged(found, "joint-moe").ratio.high[at] == pytest.approx(max(streams))  # that law has E itself


def test_a_dense_model_with_one_stream_is_worth_its_parameters(found):
    at = index_of(found, streams=1, experts=1, blocks=1)
    for one in found.judged:
        assert one.ratio.low[at] == pytest.approx(1) and one.ratio.high[at] == pytest.approx(1)


def test_as_many_experts_as_are_used_are_a_dense_model(found):
    at = index_of(found, streams=1, experts=16, per_token=2, blocks=1)
    sizes = replace(found.table.sizes.at(at), per_token=np.array([16.0]))
    for factor in routed_factors(sizes):
        if factor.law.startswith("routed"):
            assert factor.value[0] == pytest.approx(1)


def test_without_limits_the_best_dense_model_is_the_laws_own_optimum():
    free = search(axes=DENSE, memory=1e15)
    one = judged(free, "chinchilla")
    best = int(np.argmin(one.loss))
    expected = law_named("chinchilla").predict("optimal_parameters", {"C": np.asarray(BUDGET)})
    assert free.table.sizes.parameters[best] == pytest.approx(float(expected), rel=0.35)  # a grid, and C is not 6 N D
    assert one.multiplier[best] == pytest.approx(1, abs=0.01)


def test_what_fits_keeps_the_limits_and_nothing_on_the_front_is_dominated(found):
    fits = found.fits
    assert (found.table.memory[fits] <= found.limits.memory).all()
    points = np.stack([found.table.memory, found.table.latency, *(one.loss for one in found.judged)], axis=1)
    for index in found.front:
        others = points[fits]
        assert not (np.all(others <= points[index], axis=1) & np.any(others < points[index], axis=1)).any()
    for index in np.flatnonzero(found.dominator >= 0):
        better = found.dominator[index]
        assert fits[better] and (points[better] <= points[index]).all()
    assert len(found.front) + (found.dominator >= 0).sum() == fits.sum()


def test_memory_binds_a_large_budget_and_not_a_large_memory():
    assert "memory" in search(memory=2 * GIB, axes=DENSE).binds
    assert search(memory=500 * GIB, axes=DENSE).binds == []


def test_served_tokens_ask_for_smaller_models_and_are_paid_for():
    plain, serving = search(axes=DENSE), search(axes=DENSE, served=1e11)
    assert serving.table.sizes.parameters[serving.best()] < plain.table.sizes.parameters[plain.best()]
    spent = serving.tokens * serving.table.train + 1e11 * serving.table.serve
    assert spent[serving.best()] == pytest.approx(BUDGET)


def test_repeated_tokens_are_worth_less():
    fresh, few = search(axes=DENSE, memory=200 * GIB), search(axes=DENSE, memory=200 * GIB, unique=1e9)
    worth = law_named("muennighoff").predict("effective_tokens_ratio", {"D": fresh.tokens, "U": np.full(len(fresh.tokens), 1e9)})
    law, one = law_named("besiroglu").values, judged(few, "besiroglu")
    by_hand = law["E"] + law["A"] / few.table.sizes.parameters ** law["alpha"] + law["B"] / (few.tokens * worth) ** law["beta"]
    assert one.loss == pytest.approx(by_hand)
    assert few.table.sizes.parameters[few.best()] > fresh.table.sizes.parameters[fresh.best()]


def test_streams_in_a_share_of_the_tokens_leave_more_tokens():
    whole, part = search(), search(axes=replace(AXES, stream_share=0.02))
    one, tokens = next((one, tokens) for one, tokens in zip(part.table.models, part.tokens, strict=True) if "P4 E1 " in one.name)
    plain = one.model.model_copy(update={"streams": Streams()})
    keys = (WORK.sequence + 1) / 2
    mean = 0.02 * accounting.flops_per_token(one.model, keys) + 0.98 * accounting.flops_per_token(plain, keys)
    assert tokens * mean == pytest.approx(BUDGET)
    assert judged(part, "besiroglu").loss.min() < judged(whole, "besiroglu").loss.min()


def test_blocks_are_dominated_until_runs_show_their_worth():
    plain, worthy = search(), search(own=Own(given={2: 1.2}))
    assert plain.table.sizes.blocks[plain.best()] == 1
    assert (plain.dominator[plain.fits & (plain.table.sizes.blocks == 2)] >= 0).all()
    assert worthy.table.sizes.blocks[worthy.best()] == 2


def test_two_blocks_pay_later_by_time_than_by_flops():
    plain = search()
    pays = break_even(plain)
    assert min(pays.by_flops) > 1 and max(pays.by_flops) < min(pays.by_time) and max(pays.by_time) < 1.05
    assert 1.001 < pays.longer < 1.05
    worthy = break_even(search(own=Own(given={2: 1.2})))
    assert worthy.by_flops == pytest.approx(pays.by_flops, rel=1e-6), "the a_K that is needed, not what is missing"
    assert break_even(replace(plain, fits=plain.table.sizes.blocks == 2)) is None


def test_intervals_are_given_where_runs_are_known_and_nowhere_else(found):
    dense = index_of(found, streams=1, experts=1, blocks=1)
    wide = index_of(found, streams=4, experts=1, blocks=1)
    published, fitted = judged(found, "besiroglu"), judged(found, "redpajama-fit")
    assert published.low[dense] == published.high[dense]
    assert fitted.low[dense] < fitted.loss[dense] < fitted.high[dense]
    assert published.low[wide] < published.loss[wide] < published.high[wide]
    said = {law["law"]: law["interval"] for law in axis_report(found, 20)["laws"]}
    assert said["chinchilla"] == "no interval published" and said["redpajama-fit"] == "20 refits of its 23 runs"


def test_the_report_carries_the_hypothesis_the_binding_limit_and_json(found):
    facts = axis_report(found, 20)
    text = "\n".join(axis_lines(facts))
    for line in HYPOTHESIS:
        assert line in text
    assert "OUT OF RANGE" in text and "binds" in text and "the laws' own choices" in text
    assert json.loads(json.dumps(facts, allow_nan=False))["candidates"]["tried"] == len(found.table)
    for row in facts["designs"]:
        assert row["training_flops"] == pytest.approx(BUDGET)


def test_a_comparison_that_ends_with_the_shapes_says_so(found):
    """Of a small budget the best dense model would be smaller than any shape: what more FLOPs are worth is not known."""
    small = axis_report(search(3e17, DENSE), 0)
    assert any("smallest there is, 512x4, by chinchilla" in line for line in small["caveats"])
    assert any("best design has the smallest shape" in line for line in small["caveats"])
    assert "LIMITED BY THE GRID" in "\n".join(axis_lines(small))
    middle = axis_report(search(BUDGET, DENSE), 0)
    assert middle["grid_ends"] == [] and "LIMITED BY THE GRID" not in "\n".join(axis_lines(middle))


def test_a_multiplier_beyond_the_dense_curve_is_flagged():
    """Few unique tokens: no dense budget of the curve is as bad."""
    facts = axis_report(search(axes=DENSE, unique=2e6), 0)
    assert any("cut at 0.001 or 1000" in line for line in facts["caveats"])
    rows = [said for row in facts["designs"] for said in row["by_law"].values()]
    assert all(said["compute_multiplier_cut"] == (said["compute_multiplier_range"][0] <= 0.001 * (1 + 1e-9)) for said in rows)
    assert any(said["compute_multiplier_cut"] for said in rows) and " CUT" in "\n".join(axis_lines(facts))


def test_what_leaves_a_laws_range_is_flagged(found):
    inner = {one.name: one.active_inner for one in found.table.models}
    largest = law_named("routed-hash").variables["N"].high
    routed = [row for row in axis_report(found, 20)["designs"] if row["E"] > 1]
    assert routed
    for row in routed:
        flags = row["out_of_range"].get("routed-hash", [])
        assert ("N" in flags) == (inner[row["name"]] > largest)
        assert ("k" in flags) == (row["k"] > 1)
        assert row["leverage"]["out_of_range"] == ["G"]  # experts as wide as the feed-forward


def test_every_axis_value_is_answered_for(found):
    rows = axis_report(found, 20)["axes"]
    assert {(row["axis"], row["value"]) for row in rows} >= {("P", 1), ("P", 4), ("E", 1), ("E", 16), ("k", 2), ("K", 2)}
    assert all(row["why"] for row in rows)
    assert next(row for row in rows if (row["axis"], row["value"]) == ("K", 2))["dominated_by"]


@pytest.mark.parametrize(
    ("flops", "limits", "place"),
    [
        (1e10, {}, "--flops"),
        (1e32, {}, "--flops"),
        (float("nan"), {}, "--flops"),
        (BUDGET, {"memory": 1e6}, "--memory"),
        (BUDGET, {"memory": -1.0}, "--memory"),
        (BUDGET, {"latency": 1e-7}, "--latency"),
        (BUDGET, {"served": 1e16}, "--served"),
        (BUDGET, {"served": -1.0}, "--served"),
        (BUDGET, {"unique": 0.0}, "--unique"),
    ],
)
def test_impossible_budgets_and_limits_are_refused(flops, limits, place):
    with pytest.raises(InputError) as refused:
        search(flops, axes=DENSE, **limits)
    assert refused.value.place == place and refused.value.remedy


def test_senseless_axes_are_refused():
    with pytest.raises(InputError, match="experts"):
        Axes(experts=(0,))
    with pytest.raises(InputError, match="stream-share"):
        Axes(stream_share=0.0)
