"""The registry: entries are complete, and they repeat numbers that their sources print."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config.errors import InputError
from megascale.laws.law import Law, printed_error, rounding_effects
from megascale.laws.registry import FORMS, LAWS, form_named, law_named


def at(**inputs: float) -> dict[str, np.ndarray]:
    return {symbol: np.asarray([value], dtype=np.float64) for symbol, value in inputs.items()}


def value(law: str, quantity: str, **inputs: float) -> float:
    return float(np.ravel(law_named(law).predict(quantity, at(**inputs)))[0])


FAMILIES = {
    "parscale-stack", "parscale-pile", "routed-s-base", "routed-rl-r", "routed-hash", "utilisation-s-base", "compute-only", "kaplan",
    "chinchilla", "besiroglu", "muennighoff", "sardana", "krajewski", "joint-moe", "ling-leverage",
}  # fmt: skip


def test_every_family_is_there() -> None:
    assert set(LAWS) >= FAMILIES
    assert all(name == law.name for name, law in LAWS.items())


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_an_entry_says_where_it_comes_from_and_what_its_symbols_mean(law: Law) -> None:
    assert "arXiv" in law.source and law.formula and law.notes and law.corpus
    needed = {symbol for quantity in law.quantities for symbol in quantity.inputs}
    assert needed == set(law.given)
    for variable in law.variables.values():
        assert variable.meaning and variable.unit and variable.low < variable.high
    for name, constant in law.constants.items():
        assert np.isfinite(constant.value), name
        if constant.printed:  # rounded, not another number
            assert float(constant.printed) == pytest.approx(constant.value, rel=0.06)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_an_entry_predicts_something_sensible_in_the_middle_of_its_range(law: Law) -> None:
    middle = {"C": np.asarray([1e21]), "I": np.asarray([1e11]), "S": np.asarray([1e5]), "L": np.asarray([3.0]), **law.centre()}
    for quantity in law.quantities:
        found = law.predict(quantity.name, middle)
        assert np.all(np.isfinite(found)) and np.all(found > 0), quantity.name
        if quantity.name == "loss":
            assert 0.5 < found[0] < 10


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law.form], ids=lambda law: law.name)
def test_a_form_with_the_published_constants_is_the_published_law(law: Law) -> None:
    assert law.form is not None
    inputs = {symbol: np.asarray(values) for symbol, values in law.centre().items()}
    name = next(q.name for q in law.quantities if set(q.inputs) == set(law.form.inputs))
    assert law.form.evaluate(law.values, inputs) == pytest.approx(law.predict(name, inputs), rel=1e-12)


def test_parscale_multiplies_parameters() -> None:
    """Effective parameters of arXiv 2505.10475: 1, 1.273, 1.545, 1.818 on Stack; 1.695 on Pile at P = 8."""
    assert [round(value("parscale-stack", "stream_parameters_ratio", P=p), 3) for p in (1, 2, 4, 8)] == [1, 1.273, 1.546, 1.818]
    assert value("parscale-pile", "stream_parameters_ratio", P=8) == pytest.approx(1.6956, abs=1e-4)


@pytest.mark.parametrize("router,cutoff", [("s-base", 937e9), ("rl-r", 85e9), ("hash", 83e9)])
def test_a_dense_model_is_its_own_effective_model_and_routing_stops_helping_at_the_printed_size(
    router: str, cutoff: float
) -> None:
    law = law_named(f"routed-{router}")
    sizes = np.geomspace(1e7, 1e12, 20)
    dense = {"N": sizes, "E": np.ones(20)}
    assert law.predict("effective_parameters", dense) == pytest.approx(sizes, rel=1e-12)
    assert value(law.name, "cutoff") == pytest.approx(cutoff, rel=1e-9)
    # Nbar solves L(Nbar, 1) = L(N, E), and at the cut-off more experts change nothing.
    routed = {"N": sizes, "E": np.full(20, 128.0)}
    effective = {"N": law.predict("effective_parameters", routed), "E": np.ones(20)}
    assert law.predict("loss", effective) == pytest.approx(law.predict("loss", routed), rel=1e-12)
    assert value(law.name, "routed_parameters_ratio", N=cutoff, E=256) == pytest.approx(1, rel=1e-6)


def test_the_printed_digits_of_rl_r_are_flagged() -> None:
    """c has two digits: as printed the law predicts more than 1 % too high in the middle of its range."""
    error = printed_error(law_named("routed-rl-r"))
    assert error is not None and error > 0.01
    assert printed_error(law_named("joint-moe")) is None
    assert rounding_effects(law_named("krajewski"))["alpha"]["loss"] > 0.005


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_constants_have_printed_digits_unless_they_are_ours(law: Law) -> None:
    assert {bool(constant.printed) for constant in law.constants.values()} == {law.evidence != "fitted here"}


def test_rounding_is_followed_into_ratios() -> None:
    effects = rounding_effects(law_named("joint-moe"))
    assert set(effects["gamma"]) == {"loss", "tokens_per_parameter", "compute_multiplier"}
    assert effects["gamma"]["compute_multiplier"] > 0.005
    assert rounding_effects(law_named("besiroglu"))["alpha"]["tokens_per_parameter"] > 1e-3


def test_muennighoff_repeats_the_example_of_its_authors() -> None:
    """README of huggingface/datablations, models of figure 1."""
    assert value("muennighoff", "loss", N=6.34e9, D=242e9, U=25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
    assert value("muennighoff", "loss", N=8.67e9, D=178e9, U=25e9) == pytest.approx(2.2269634075087867, rel=1e-12)
    assert value("muennighoff", "effective_tokens_ratio", D=1e9, U=1e9) == 1
    assert value("muennighoff", "effective_tokens_ratio", D=4e9, U=1e9) == pytest.approx(0.93, abs=0.005)


@pytest.mark.parametrize("experts,n,d", [(1, 1.7e9, 9.7e9), (8, 990e6, 17e9), (32, 669e6, 24.9e9)])
def test_the_joint_law_repeats_the_optima_of_its_table_1(experts: int, n: float, d: float) -> None:
    assert value("joint-moe", "optimal_parameters", C=1e20, E=experts) == pytest.approx(n, rel=0.02)
    assert value("joint-moe", "optimal_tokens", C=1e20, E=experts) == pytest.approx(d, rel=0.02)


@pytest.mark.parametrize(
    "experts,m,mu,n,nu", [(1, 30.3640, -0.1817, 53.9838, -0.1965), (32, 16.5424, -0.1557, 234.6726, -0.2652)]
)
def test_the_joint_law_repeats_its_table_4(experts: int, m: float, mu: float, n: float, nu: float) -> None:
    """For one number of experts it is m N^mu + n D^nu + c."""
    sizes, tokens = np.geomspace(1e8, 3e9, 5), np.geomspace(1e9, 8e10, 5)
    predicted = law_named("joint-moe").predict("loss", {"N": sizes, "D": tokens, "E": np.full(5, float(experts))})
    assert predicted == pytest.approx(m * sizes**mu + n * tokens**nu + 1.3637, rel=2e-3)


def test_experts_save_more_compute_the_more_there_are_and_the_larger_the_budget() -> None:
    gains = [value("joint-moe", "compute_multiplier", C=c, E=e) for c, e in ((1e20, 1), (1e20, 8), (1e20, 32), (1e21, 32))]
    assert gains[0] == pytest.approx(1, rel=1e-4)
    assert gains == sorted(gains)


@pytest.mark.parametrize("budget", [1e18, 1e21, 1e34])
def test_the_compute_multiplier_leads_to_a_dense_model_of_the_same_loss(budget: float) -> None:
    dense = budget * value("joint-moe", "compute_multiplier", C=budget, E=32)
    losses = []
    for c, e in ((budget, 32.0), (dense, 1.0)):
        n, d = (value("joint-moe", name, C=c, E=e) for name in ("optimal_parameters", "optimal_tokens"))
        losses.append(value("joint-moe", "loss", N=n, D=d, E=e))
        nearby = [value("joint-moe", "loss", N=n * tilt, D=d / tilt, E=e) for tilt in (0.9, 1.1)]
        assert losses[-1] < min(nearby)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_leverage_repeats_the_numbers_of_its_text() -> None:
    """EL > 7 at 3.1 % activated, G = 12, C = 1e22; the best G lies between 8 and 12."""
    assert value("ling-leverage", "compute_multiplier", A=0.031, G=12, C=1e22) == pytest.approx(7.24, abs=0.01)
    g = np.geomspace(2, 32, 200)
    found = law_named("ling-leverage").predict("compute_multiplier", {"A": np.full(200, 0.031), "G": g, "C": np.full(200, 1e22)})
    assert 8 <= g[np.argmax(found)] <= 12


def test_an_optimum_serves_fewer_flops_when_tokens_are_served() -> None:
    """arXiv 2401.00448, figure 1: 13B quality and 2e12 tokens served want a 7B model and save 17 %."""
    compute = 4.828376711178941e22  # optimal for 13B
    assert value("chinchilla", "optimal_parameters", C=compute) == pytest.approx(13e9, rel=1e-6)
    assert value("chinchilla", "served_parameters", C=compute, I=2e12) == pytest.approx(7e9, rel=0.05)
    assert value("chinchilla", "served_saving", C=compute, I=2e12) == pytest.approx(0.17, abs=0.01)
    assert value("chinchilla", "served_parameters", C=compute, I=1) == pytest.approx(13e9, rel=1e-3)


@pytest.mark.parametrize("name", ["chinchilla", "besiroglu", "sardana"])
@given(log_c=st.floats(18, 25), tilt=st.floats(-1, 1))
def test_no_allocation_of_the_same_compute_beats_the_optimum(name: str, log_c: float, tilt: float) -> None:
    c, law = 10**log_c, law_named(name)
    n = value(name, "optimal_parameters", C=c) * 10**tilt
    other = {"N": np.asarray([n]), "D": np.asarray([c / (6 * n)])}
    best = value(name, "optimal_loss", C=c)
    assert law.predict("loss", other)[0] >= best * (1 - 1e-12)
    # The share of the compute that the best allocation needs for the same loss, and back.
    share = float(law.predict("compute_share", other)[0])
    assert share <= 1 + 1e-9
    assert value(name, "optimal_loss", C=c * share) == pytest.approx(float(law.predict("loss", other)[0]), rel=1e-9)


def test_the_replication_puts_twenty_tokens_on_a_parameter() -> None:
    assert value("besiroglu", "tokens_per_parameter", C=1e22) == pytest.approx(20.4, abs=0.1)


@pytest.mark.parametrize("ratio,share", [(5, 0.84), (100, 0.80), (200, 0.64), (1000, 0.29)])
def test_what_an_allocation_off_the_optimum_wastes(ratio: float, share: float) -> None:
    """How wrong 'only compute counts' is, by tokens a parameter at 1e22 FLOPs."""
    n = np.sqrt(1e22 / 6 / ratio)
    assert value("besiroglu", "compute_share", N=n, D=n * ratio) == pytest.approx(share, abs=0.01)


def test_the_two_predictions_of_the_compute_only_law() -> None:
    quality = value("compute-only", "bits_per_character", N=8e9, D=15e12)
    tokens = value("compute-only", "equal_quality_tokens", N=8e9, D=15e12, N2=4e9)
    assert tokens == 30e12  # (a) half the parameters, twice the tokens, the same quality, half the cost of serving
    assert value("compute-only", "bits_per_character", N=4e9, D=tokens) == pytest.approx(quality, rel=1e-12)
    assert value("compute-only", "serving_ratio", N=8e9, N2=4e9) == 0.5
    # (b) with the data used up only parameters are left
    needed = value("compute-only", "needed_parameters", BPC=quality - 0.02, D=15e12)
    assert needed == pytest.approx(8e9 * np.exp(0.02 / 0.0308), rel=1e-9)
    assert value("compute-only", "needed_compute", BPC=0.30) == pytest.approx(4.2e25, rel=0.01)


def test_predictions_outside_the_range_are_flagged() -> None:
    law = law_named("chinchilla")
    assert law.outside(at(N=1e9, D=2e10)) == {}
    assert set(law.outside(at(N=1e8, D=4e11))) == {"D/N"}
    assert set(law.outside(at(N=1e12, D=2e10))) == {"N", "D/N"}
    ends = {symbol: np.asarray([v.low, v.high]) for symbol, v in law_named("parscale-pile").variables.items()}
    assert law_named("parscale-pile").outside(ends) == {}


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean chinchilla"):
        law_named("chinchila")
    with pytest.raises(InputError, match="laws list --forms"):
        form_named("nothing like it")
    assert len(FORMS) == len({form.formula for form in FORMS.values()})
