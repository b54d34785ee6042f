"""The pictures of the search over axes: their numbers are the search's own, and one loss along each axis is one loss by the law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.laws.registry import law_named
from megascale.observe.figures import figure_of
from megascale.plan.axis_candidates import Axes, Workload, dense_table
from megascale.plan.axis_curves import axis_curves, group_masks
from megascale.plan.axis_plots import pictures, plot_axes
from megascale.plan.axis_search import AxisSearch, Limits, dense_curve, search_axes
from megascale.plan.cluster import load_cluster
from megascale.plan.iso_loss import TIMES_N, iso_loss

GIB = 2**30
BUDGET, DRAWS = 1e21, 10
DEVICE = load_cluster("a100")
AXES = Axes(streams=(1, 4), experts=(1, 16), per_token=(1,), blocks=(1,))
WORK = Workload(sequence=2048, context=2048)
Facts = dict[str, Any]


def search(flops: float = BUDGET, draws: int = DRAWS, **limits: float) -> AxisSearch:
    return search_axes(flops, DEVICE, Limits(**{"memory": 12.0 * GIB} | limits), AXES, WORK, None, draws)


@pytest.fixture(scope="module")
def found() -> AxisSearch:
    return search()


@pytest.fixture(scope="module")
def curves(found: AxisSearch) -> Facts:
    return axis_curves(found, DRAWS)


@pytest.fixture(scope="module")
def iso(found: AxisSearch) -> Facts:
    return iso_loss(found, DRAWS)


# Loss against one number --------------------------------------------------------------------------------------------------


def test_at_every_budget_the_best_is_what_the_search_finds_there(curves: Facts) -> None:
    for law, said in curves["laws"].items():
        row = said["best"][2]
        there = search(row["flops"])
        one = next(judged for judged in there.judged if judged.base.name == law)
        at = int(np.flatnonzero(there.fits)[np.argmin(one.loss[there.fits])])
        assert (row["name"], row["loss"]) == (there.table.models[at].name, float(one.loss[at]))
        assert (row["low"], row["high"]) == (float(one.low[at]), float(one.high[at]))
        losses = [point["loss"] for point in said["best"]]
        assert losses == sorted(losses, reverse=True)


def test_the_distance_to_the_dense_curve_is_the_compute_multiplier(curves: Facts) -> None:
    said = curves["laws"]["besiroglu"]
    row = next(row for row in said["best"] if row["flops"] == BUDGET)
    dense = np.array(said["dense"]["loss"])
    needed = np.exp(np.interp(-row["loss"], -dense, np.log(said["dense"]["flops"])))
    assert needed / BUDGET == pytest.approx(row["compute_multiplier"])


def test_profiles_are_the_best_of_the_budget_by_group(found: AxisSearch, curves: Facts) -> None:
    names = [one.name for one in found.table.models]
    masks = group_masks(found.table.sizes)
    for judged in found.judged:
        for symbol in ("N", "D"):
            groups = curves["laws"][judged.base.name]["profiles"][symbol]
            for group, rows in groups.items():
                for row in rows:
                    at = names.index(row["name"])
                    assert masks[group][at] and found.fits[at]
                    assert (row["N"], row["D"], row["loss"]) == (found.table.models[at].active, found.tokens[at], judged.loss[at])
                assert [row[symbol] for row in rows] == sorted(row[symbol] for row in rows)
                assert min(row["loss"] for row in rows) == judged.loss[masks[group] & found.fits].min()


def test_budgets_that_train_nothing_are_named(curves: Facts) -> None:
    assert curves["left_out"] == []
    served = axis_curves(search(draws=0, served=1e12), 0)
    assert served["left_out"][0] == {"flops": BUDGET * 10**-1.5, "reason": "no design keeps the limits"}
    assert len(served["laws"]["chinchilla"]["best"]) + len(served["left_out"]) == 13


# One loss -----------------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_best_dense_shape_of_the_budget(found: AxisSearch, iso: Facts) -> None:
    for judged in found.judged:
        said = iso[judged.base.name]
        budgets, losses = dense_curve(judged.base, dense_table(WORK, DEVICE), BUDGET)
        assert said["reference"]["loss"] == losses[np.argmin(np.abs(budgets / BUDGET - 1))]
        for row in (said["axes"]["P"][0], said["axes"]["E"][0], _at_reference(said)):
            assert row["N"]["middle"] == pytest.approx(said["reference"]["N"], rel=1e-4)
            assert row["flops"]["middle"] == pytest.approx(BUDGET, rel=1e-4)


def _at_reference(said: Facts) -> Facts:
    return next(row for row in said["axes"]["D"] if row["D"] == said["reference"]["D"])


def test_along_the_streams_n_times_the_factor_is_the_references(iso: Facts) -> None:
    factors = [
        float(law_named(name).predict("stream_parameters_ratio", {"P": 4.0})) for name in ("parscale-stack", "parscale-pile")
    ]
    said = iso["chinchilla"]
    row = next(row for row in said["axes"]["P"] if row["value"] == 4)
    assert row["D"] == said["reference"]["D"]
    assert row["N"]["least"] * max(factors) < said["reference"]["N"] < row["N"]["most"] * min(factors)  # their interval beyond
    assert row["N"]["least"] * max(factors) == pytest.approx(said["reference"]["N"], rel=0.1)
    assert row["N"]["least"] < row["N"]["middle"] < row["N"]["most"]
    one, four = (row["flops"]["middle"] for row in said["axes"]["P"])
    assert 2 < four / one < 4  # four streams compute four times as much with fewer parameters


def test_experts_save_training_flops_and_need_memory(iso: Facts) -> None:
    dense, routed = iso["besiroglu"]["axes"]["E"]
    assert routed["flops"]["most"] < dense["flops"]["middle"]
    assert routed["memory_bytes"] > dense["memory_bytes"]
    (_, inside) = iso["joint-moe"]["axes"]["E"]
    assert inside["N"]["least"] == inside["N"]["most"]  # E is in the law: its factors have nothing to say


def test_along_the_tokens_the_law_gives_one_loss_and_the_flops_are_counted(iso: Facts) -> None:
    law, said = law_named("besiroglu").values, iso["besiroglu"]
    dense = dense_table(WORK, DEVICE)
    for row in said["axes"]["D"]:
        if row["N"]["middle"] is not None:
            loss = law["E"] + law["A"] / row["N"]["middle"] ** law["alpha"] + law["B"] / row["D"] ** law["beta"]
            assert loss == pytest.approx(said["reference"]["loss"], abs=1e-5)
            near = np.argsort(np.abs(dense.sizes.parameters / row["N"]["middle"] - 1))[:8]
            a_token = row["flops"]["middle"] / row["D"] / row["N"]["middle"]
            counted = dense.train[near] / dense.sizes.parameters[near]
            assert counted.min() <= a_token * 1.001 and a_token <= counted.max() * 1.001
    flops = [row["flops"]["middle"] for row in said["axes"]["D"] if row["flops"]["middle"] is not None]
    assert min(flops) >= BUDGET * 0.97  # no dense model reaches that loss for less, but for the steps between shapes


def test_only_a_law_with_refits_has_ends_along_the_tokens(iso: Facts) -> None:
    for law, said in iso.items():
        for row in said["axes"]["D"]:
            ends = row["N"]
            if law != "redpajama-fit" or row["D"] == said["reference"]["D"]:
                assert ends["least"] is ends["most"] is None or ends["least"] == pytest.approx(ends["most"], rel=1e-3)
            elif ends["middle"] is not None:
                assert ends["least"] < (ends["most"] or np.inf)


def test_lines_of_other_losses_start_at_other_sizes(iso: Facts) -> None:
    said = iso["sardana"]
    start = said["axes"]["P"][0]["N_at_levels"]
    assert start == pytest.approx([said["reference"]["N"] * times for times in TIMES_N], rel=1e-3)
    assert said["levels"] == sorted(said["levels"], reverse=True)


# Pictures -----------------------------------------------------------------------------------------------------------------


def test_a_panel_for_each_law_and_lines_for_what_is_compared(curves: Facts, iso: Facts) -> None:
    drawn = {name: draw() for name, draw in pictures(curves, iso).items()}
    assert len(drawn) == 4 + len(curves["laws"])
    for name in ("loss_flops", "loss_parameters", "loss_tokens"):
        axes = figure_of(drawn[name]).axes
        assert [one.get_title().split(" ")[0] for one in axes] == list(curves["laws"])
        assert all(one.get_xscale() == "log" for one in axes)
    labels = drawn["loss_flops"].get_legend_handles_labels()[1]
    assert labels == ["best dense shape, no limits", "best design within the limits", "the budget"]
    groups = drawn["loss_parameters"].get_legend_handles_labels()[1]
    assert groups == ["dense", "experts", "streams", "streams and experts", "least loss"]
    assert drawn["iso_flops"].get_legend_handles_labels()[1] == list(iso)
    assert len(figure_of(drawn["iso_flops"]).axes) == 3
    contours = figure_of(drawn["iso_loss_sardana"]).axes
    assert len(contours) == 6 and len(contours[0].lines) == len(TIMES_N)


def test_what_is_out_of_range_is_hollow(curves: Facts, iso: Facts) -> None:
    axes = pictures(curves, iso)["loss_flops"]()
    rows = next(iter(curves["laws"].values()))["best"]
    inside, outside = (line for line in axes.lines if line.get_marker() == "o")
    assert outside.get_markerfacecolor() == "white"
    assert len(outside.get_xdata()) == sum(bool(row["out_of_range"]) for row in rows)
    assert len(inside.get_xdata()) == sum(not row["out_of_range"] for row in rows)


def test_files_are_written_and_json_holds_their_numbers(curves: Facts, iso: Facts, tmp_path: Path) -> None:
    one = {"sardana": iso["sardana"]}
    few = {**curves, "laws": {"sardana": curves["laws"]["sardana"]}}
    files = plot_axes(few, one, tmp_path / "new" / "folder")
    names = ["loss_flops", "loss_parameters", "loss_tokens", "iso_flops", "iso_loss_sardana"]
    assert [file.stem for file in files] == names
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
    json.dumps([curves, iso], allow_nan=False)


def test_a_folder_that_cannot_be_made_is_refused(curves: Facts, iso: Facts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder that can be written"):
        plot_axes(curves, iso, tmp_path / "file")
