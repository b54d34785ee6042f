"""Fits recover what was planted, say how sure they are, and refuse what the runs cannot carry."""

from __future__ import annotations

import itertools
from operator import itemgetter

import numpy as np
import pytest

from megascale.laws.fit import Fit, FitOptions, fit
from megascale.laws.form import Form
from megascale.laws.identify import identifiability
from megascale.laws.refusals import BadTable, FitRefused, NotSeparable, NotVaried, TooFewRuns
from megascale.laws.registry import FORMS, LAWS, form_named, law_named
from megascale.laws.study import load, save, study
from megascale.laws.table import RunTable
from megascale.laws.uncertainty import bootstrap

N = tuple(np.geomspace(2e7, 2e9, 6))
LEVELS = {
    "N": N,
    "D": tuple(np.geomspace(1e9, 1e11, 5)),
    "P": (1.0, 2.0, 4.0, 8.0),
    "E": (1.0, 4.0, 16.0, 64.0, 256.0),
    "G": (1.0, 2.0, 4.0, 8.0),
    "K": (1.0, 2.0, 4.0),
}
LEVELS |= {"F": tuple(np.geomspace(1e-4, 4e-3, 6)), "B": (0.2, 1.0, 4.0, 12.0, 40.0), "U": (3e8, 3e9, 3e10)}
PUBLISHED = [law for law in LAWS.values() if law.form and law.name != "sardana"]  # sardana has chinchilla's form


def table(form: Form, values: dict[str, float], noise: float = 0.0, seed: int = 0, **levels: tuple[float, ...]) -> RunTable:
    """Runs on a full grid whose losses obey the form, up to log-normal noise."""
    cells = np.array(list(itertools.product(*(levels.get(symbol, LEVELS[symbol]) for symbol in form.inputs))))
    columns = {symbol: cells[:, i] for i, symbol in enumerate(form.inputs)}
    rng = np.random.default_rng(seed)
    columns["loss"] = form.evaluate(values, columns) * np.exp(noise * rng.standard_normal(len(cells)))
    return RunTable("planted runs", columns)


def planted(name: str) -> tuple[Form, dict[str, float]]:
    law = law_named(name)
    assert law.form is not None
    return law.form, dict(law.values)


@pytest.mark.parametrize("law", PUBLISHED, ids=lambda law: law.name)
def test_losses_without_noise_are_fitted_exactly_and_give_the_planted_parameters(law) -> None:
    runs = table(law.form, dict(law.values))
    found = fit(law.form, runs, FitOptions(starts=16))
    assert found.rmsle < 1e-5
    tolerance = {"joint-moe": 0.2, "krajewski": 0.05, "muennighoff": 0.05}.get(law.name, 1e-2)  # eleven parameters bend together
    for name in law.form.names:
        assert found.values[name] == pytest.approx(law.values[name], rel=tolerance, abs=1e-3), name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("blocks", {"b": 0.06, "alpha": 0.3, "E": 1.7, "A": 2e8}),
        ("blocks", {"b": -0.1, "alpha": 0.3, "E": 1.7, "A": 2e8}),
        ("axes", {"k": 0.35, "m": 0.15, "b": 0.06, "alpha": 0.3, "beta": 0.28, "L0": 1.6, "A": 400.0, "B": 900.0}),
    ],
    ids=["blocks that help", "blocks that harm", "all axes"],
)
def test_forms_without_a_published_law_are_fitted_too(name: str, values: dict[str, float]) -> None:
    found = fit(form_named(name), table(form_named(name), values), FitOptions(starts=16))
    for parameter, value in values.items():
        assert found.values[parameter] == pytest.approx(value, rel=1e-2), parameter


@pytest.mark.parametrize("name", ["parscale-pile", "chinchilla"])
def test_intervals_hold_the_planted_parameters(name: str) -> None:
    """95 % intervals, 0.3 % noise, four data sets: most parameters of most sets lie inside, and the intervals say something."""
    form, values = planted(name)
    exponent = form.names[form.names.index("alpha")]
    inside = []
    for seed in range(4):
        runs = table(form, values, noise=0.003, seed=seed)
        draws = bootstrap(fit(form, runs, FitOptions(starts=4)), runs, 40, seed)
        ends = {parameter: draws.interval(itemgetter(parameter)) for parameter in form.names}
        inside += [low <= values[parameter] <= high for parameter, (low, high) in ends.items()]
        assert 0.005 < ends[exponent][1] - ends[exponent][0] < 0.2
        assert draws.failed == 0
    assert np.mean(inside) >= 0.7


def test_the_same_seed_gives_the_same_study() -> None:
    form, values = planted("parscale-pile")
    runs = table(form, values, noise=0.01, N=N[:4])
    first, again, other = (study(form.name, runs, FitOptions(seed=seed, starts=4), 5).facts() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_one_spoilt_run_does_not_move_the_fit() -> None:
    form, values = planted("chinchilla")
    runs = table(form, values, noise=0.001)
    runs.columns["loss"][7] *= 1.3
    robust, squares = (fit(form, runs, FitOptions(delta, starts=8)).values["alpha"] for delta in (None, 10.0))
    assert abs(robust / values["alpha"] - 1) < 0.05 < abs(squares / values["alpha"] - 1)


def test_two_different_designs_are_judged_differently() -> None:
    """Chinchilla's form on a grid, and on runs that all have the best ratio of tokens to parameters."""
    form, values = planted("chinchilla")
    grid = table(form, values)
    on_optimum = {"N": np.geomspace(2e7, 2e10, 30), "D": 20 * np.geomspace(2e7, 2e10, 30)}
    line = RunTable("line", {**on_optimum, "loss": form.evaluate(values, on_optimum)})
    judged = [
        identifiability(Fit(form, values, 1e-3, np.zeros(len(t)), 1.0, 1), t.inputs(form.inputs), "x") for t in (grid, line)
    ]
    assert judged[1].condition > 10 * judged[0].condition
    assert any({"alpha", "beta"} <= set(group) for group in judged[1].weak)
    assert not any({"alpha", "beta"} <= set(group) for group in judged[0].weak)


def test_a_term_that_the_runs_do_not_need_is_reported_as_zero() -> None:
    """Losses fall faster than any power law with a floor: the best floor is none."""
    n, d = (column.ravel() for column in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    runs = RunTable("bending runs", {"N": n, "D": d, "loss": 4 - 0.05 * np.log(n * d) - 0.002 * np.log(n * d / 1e16) ** 2})
    found = study("compute-power-floor", runs, FitOptions(starts=4), draws=0)
    assert found.identifiability.at_zero == ("E",)
    assert found.fit.values["E"] < 1e-6


@pytest.mark.parametrize(
    "levels,kind,words",
    [
        ({"P": (4.0,)}, NotVaried, "all 6 runs have P = 4"),
        ({"N": N[:2], "P": (1.0, 2.0)}, TooFewRuns, "4 runs with 4 different settings; parscale has 4 parameters"),
    ],
)
def test_designs_that_cannot_carry_a_fit_are_refused_before_it_starts(levels, kind: type[FitRefused], words: str) -> None:
    form, values = planted("parscale-pile")
    with pytest.raises(kind, match=words) as caught:
        fit(form, table(form, values, **levels))
    assert caught.value.place == "planted runs" and caught.value.remedy


def test_repeated_runs_do_not_count_as_settings() -> None:
    form, values = planted("parscale-pile")
    runs = table(form, values, N=N[:2], P=(1.0, 2.0))
    with pytest.raises(TooFewRuns, match="12 runs with 4 different"):
        fit(form, runs.rows(np.tile(np.arange(4), 3)))


def test_parameters_that_the_runs_cannot_separate_are_named() -> None:
    """Two numbers of streams give one gain: its height and its exponent cannot both be known."""
    form = form_named("parscale-additive")
    values = {"E": 1.2, "A": 60.0, "alpha": 0.25, "B": 0.1, "beta": 0.5}
    with pytest.raises(NotSeparable, match="cannot separate") as caught:
        study(form.name, table(form, values, P=(1.0, 2.0)), draws=0)
    assert "E from B" in caught.value.reason


def test_one_token_budget_cannot_give_the_exponent_of_tokens() -> None:
    form, values = planted("chinchilla")
    with pytest.raises(NotVaried, match="cannot learn what D does"):
        fit(form, table(form, values, D=(1e10,)))


def test_a_fit_needs_positive_numbers_and_its_columns() -> None:
    form, values = planted("chinchilla")
    runs = table(form, values)
    with pytest.raises(BadTable, match="no column P"):
        fit(form_named("parscale"), runs)
    with pytest.raises(BadTable, match="P of 0.05, which is below 1"):
        fit(form_named("parscale"), RunTable("x", {**runs.columns, "P": np.full(len(runs), 0.05)}))
    runs.columns["D"][3] = 0
    with pytest.raises(BadTable, match="D of 0"):
        fit(form, runs)


def test_held_out_errors_are_those_of_fits_without_the_runs() -> None:
    form, values = planted("parscale-pile")
    runs = table(form, values, noise=0.004)
    found = study(form.name, runs, FitOptions(starts=8), draws=0)
    without = fit(form, runs.rows(np.arange(len(runs)) != 5), FitOptions(delta=found.fit.delta))
    here = runs.rows([5])
    assert found.left_out[5] == pytest.approx(np.log(without.predict(here.columns)[0] / here.loss[0]), abs=1e-5)
    small = fit(form, runs.rows(runs.columns["N"] < 1.9e9), FitOptions(delta=found.fit.delta))
    large = runs.rows(runs.columns["N"] > 1.9e9)
    residual = np.log(small.predict(large.columns) / large.loss)
    assert not isinstance(found.size_holdout, str)
    assert found.size_holdout.runs == len(large)
    assert found.size_holdout.rmsle == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-2)
    assert found.left_out_rmsle > found.fit.rmsle


def test_a_size_holdout_that_leaves_too_little_says_so() -> None:
    form, values = planted("parscale-pile")
    found = study(form.name, table(form, values, N=N[:2]), FitOptions(starts=8), draws=0)
    assert isinstance(found.size_holdout, str) and "not possible" in found.size_holdout


def test_a_saved_fit_predicts_the_same(tmp_path) -> None:
    form, values = planted("routed-hash")
    found = study(form.name, table(form, values, noise=0.003), FitOptions(starts=4), 20)
    save(found, tmp_path / "fit.json")
    again = load(tmp_path / "fit.json")
    inputs = {"N": np.array([1e9, 1e13]), "E": np.array([64.0, 64.0])}
    assert again.draws.form.evaluate(again.values, inputs) == pytest.approx(found.fit.predict(inputs), rel=1e-12)
    assert np.array(again.draws.predictions(inputs)) == pytest.approx(np.array(found.draws.predictions(inputs)), rel=1e-12)
    assert again.outside(inputs)["N"].tolist() == [False, True]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is no saved fit"):
        load(tmp_path / "other.json")


def test_every_form_has_starts_inside_its_bounds() -> None:
    for form in FORMS.values():
        for parameter in form.parameters:
            assert parameter.least <= parameter.low < parameter.high <= parameter.most, (form.name, parameter.name)
