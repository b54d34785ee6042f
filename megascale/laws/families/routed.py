"""Unified scaling laws for routed language models (arXiv 2202.01169), and forms that compete with equation 1.

N parameters that one token sees, without embeddings (K = 1 count); E experts, 1 = dense; Ehat saturated experts. Logarithms base 10.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.families.effective_parameters import cutoff, effective_parameters, saturated
from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable

_LN10 = float(np.log(10))
_SATURATION = (Parameter("E_start", 1.0, 6.0, least=0.05, most=40.0), Parameter("E_max", 60.0, 3000.0, least=50.0, most=1e6))
_BILINEAR = tuple(Linear(name, positive=False) for name in "abcd")


def _experts(v: Values, x: Inputs) -> Array:
    return np.log10(saturated(x["E"], v["E_start"], v["E_max"]) if "E_start" in v else x["E"])


def _power(v: Values, x: Inputs) -> Array:
    n, e = np.log10(x["N"]), _experts(v, x)
    return 10 ** (v["a"] * n + v["b"] * e + v.get("c", 0.0) * n * e + v["d"])


def _columns(v: Values, x: Inputs) -> Array:
    n, e = np.log10(x["N"]), _experts(v, x)
    return _LN10 * np.stack([n, e, n * e, np.ones_like(n)], axis=1)


def _with_floor(v: Values, x: Inputs) -> Array:
    return v["L0"] + _power(v, x)


def _floor(v: Values, x: Inputs) -> Array:
    return np.full_like(x["N"], v["L0"])


_FLOOR = Parameter("L0", 0.2, 0.95, below_loss=True)

EQUATION_1 = Form(
    "routed", "log L = a log N + b log Ehat + c log N log Ehat + d", ("N", "E"), _SATURATION, _BILINEAR, _power, _columns, "log loss"
)  # fmt: skip
FLOOR = Form(
    "routed-floor", "L = L0 + 10^(a log N + b log Ehat + c log N log Ehat + d)", ("N", "E"), (*_SATURATION, _FLOOR), _BILINEAR,
    _with_floor, _columns, "log loss", offset=_floor,
)  # fmt: skip
NO_CROSS = Form(
    "routed-floor-no-cross", "L = L0 + 10^(a log N + b log Ehat + d)", ("N", "E"), (*_SATURATION, _FLOOR),
    tuple(linear for linear in _BILINEAR if linear.name != "c"), _with_floor, lambda v, x: _columns(v, x)[:, [0, 1, 3]], "log loss",
    offset=_floor,
)  # fmt: skip
RAW = Form("routed-raw", "log L = a log N + b log E + c log N log E + d", ("N", "E"), (), _BILINEAR, _power, _columns, "log loss")

FORMS = (EQUATION_1, FLOOR, NO_CROSS, RAW)

_QUANTITIES = (
    Quantity("loss", "nats per token", ("N", "E"), _power),
    Quantity("effective_parameters", "parameters", ("N", "E"), effective_parameters, "N of the dense model with this loss"),
    Quantity(
        "routed_parameters_ratio", "Nbar/N", ("N", "E"), lambda v, x: effective_parameters(v, x) / x["N"], dimensionless=True
    ),
    Quantity("cutoff", "parameters", (), lambda v, x: np.asarray(cutoff(v)), "N from which on routing does not help"),
)
_VARIABLES = {
    "N": Variable("parameters one token sees, without embeddings", "parameters", 16_527_360, 1_308_819_456),
    "E": Variable("experts in every other block, one a token; 1 = dense", "experts", 1, 512),
}
_NOTES = (
    "D was 130B tokens in every run, so c mixes 'N grows' with 'D/N falls'; with D scaled (joint-moe, ling-leverage) the gain grows",
    "c is printed with two digits and multiplies log N log Ehat, about 20: the c used follows from the printed N_cutoff",
    "losses and effective parameters are reproducible from the published runs; single constants and N_cutoff only within wide intervals",
    "with an irreducible loss (form routed-floor) the same runs are fitted twice as well, and S-BASE needs no cross term",
    "the constants were read in notes on the paper; they agree with the published runs",
)


def _law(name: str, router: str, printed: tuple[str, ...], cutoff_text: str) -> Law:
    names = ("a", "b", "c", "d", "E_start", "E_max")
    constants = {symbol: Constant(float(value), value) for symbol, value in zip(names, printed, strict=True)}
    implied = -constants["b"].value / float(np.log10(float(cutoff_text)))
    constants["c"] = Constant(implied, printed[2], f"from N_cutoff = {cutoff_text}")
    return Law(
        name=name,
        title=f"Routed models, {router}",
        formula=EQUATION_1.formula,
        source="arXiv 2202.01169, equation 1, table 3",
        corpus="MassiveText, vocabulary of 32,000",
        log_base="10",
        evidence="secondary",
        constants=constants,
        variables=_VARIABLES,
        quantities=_QUANTITIES,
        notes=_NOTES,
        form=EQUATION_1,
    )


LAWS = (
    _law("routed-s-base", "S-BASE", ("-0.082", "-0.108", "0.009", "1.104", "1.847", "314.478"), "937e9"),
    _law("routed-rl-r", "RL-R", ("-0.083", "-0.126", "0.012", "1.111", "1.880", "469.982"), "85e9"),
    _law("routed-hash", "HASH", ("-0.087", "-0.136", "0.012", "1.157", "4.175", "477.741"), "83e9"),
    Law(
        name="routed-dense",
        title="Routed models, the dense ones",
        formula="L = (N_c/N)^alpha_N",
        source="arXiv 2202.01169",
        corpus="MassiveText, vocabulary of 32,000",
        log_base="none",
        evidence="secondary",
        constants={"N_c": Constant(3.568e13, "3.568e13"), "alpha_N": Constant(0.078, "0.078")},
        variables={"N": Variable("parameters without embeddings", "parameters", 16_527_360, 1_308_819_456)},
        quantities=(Quantity("loss", "nats per token", ("N",), lambda v, x: (v["N_c"] / x["N"]) ** v["alpha_N"]),),
        notes=("130B tokens in every run",),
    ),
)
