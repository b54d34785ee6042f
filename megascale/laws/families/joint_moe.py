"""Joint MoE scaling laws (arXiv 2502.05172, equation 6): dense models and mixtures of E experts in one law.

N active parameters with embeddings, D tokens, E experts (1 = dense), Ehat saturated experts, C training FLOPs = 6 N D.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megascale.laws.families import additive
from megascale.laws.families.effective_parameters import saturated
from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable


def _terms(v: Values, x: Inputs) -> tuple[Array, Array]:
    """The terms of N and of D without their factors a and b."""
    experts = saturated(x["E"], v["E_start"], v["E_max"])
    log = np.log(experts)
    of_n = experts ** v["delta"] * x["N"] ** (v["alpha"] + v["gamma"] * log)
    return of_n, experts ** v["omega"] * x["D"] ** (v["beta"] + v["zeta"] * log)


def _loss(v: Values, x: Inputs) -> Array:
    of_n, of_d = _terms(v, x)
    return v["a"] * of_n + v["b"] * of_d + v["c"]


def _columns(v: Values, x: Inputs) -> Array:
    of_n, of_d = _terms(v, x)
    return np.stack([of_n, of_d, np.ones_like(of_n)], axis=1)


JOINT = Form(
    "joint-moe", "L = a Ehat^delta N^(alpha + gamma ln Ehat) + b Ehat^omega D^(beta + zeta ln Ehat) + c", ("N", "D", "E"),
    (
        Parameter("alpha", -0.5, -0.05, positive=False, least=-3, most=-1e-3), Parameter("delta", -0.6, 0.6, positive=False),
        Parameter("gamma", -0.05, 0.05, positive=False), Parameter("beta", -0.5, -0.05, positive=False, least=-3, most=-1e-3),
        Parameter("omega", -0.6, 0.6, positive=False), Parameter("zeta", -0.05, 0.05, positive=False),
        Parameter("E_start", 1.0, 6.0, least=0.05, most=40.0), Parameter("E_max", 60.0, 3000.0, least=50.0, most=1e6),
    ),
    (Linear("a"), Linear("b"), Linear("c")), _loss, _columns,
)  # fmt: skip

FORMS = (JOINT,)


def _additive(v: Values, experts: Array) -> dict[str, Any]:
    """The constants of E + A/N^alpha + B/D^beta that the law is for each number of experts; its optimum is known in closed form."""
    saturation = saturated(experts, v["E_start"], v["E_max"])
    log = np.log(saturation)
    return {
        "E": v["c"],
        "A": v["a"] * saturation ** v["delta"],
        "alpha": -(v["alpha"] + v["gamma"] * log),
        "B": v["b"] * saturation ** v["omega"],
        "beta": -(v["beta"] + v["zeta"] * log),
    }


def _optimum(v: Values, x: Inputs) -> Inputs:
    """N and D of the least loss for C = 6 N D."""
    constants = _additive(v, x["E"])
    return {"N": additive.optimal_parameters(constants, x), "D": additive.optimal_tokens(constants, x)}


def _compute_multiplier(v: Values, x: Inputs) -> Array:
    """FLOPs that the best dense model needs for the loss of the best mixture at C, over C."""
    reached = additive.optimal_loss(_additive(v, x["E"]), x) - v["c"]
    dense = _additive(v, np.ones_like(x["E"]))
    unit = additive.optimal_loss(dense, {"C": np.asarray(6.0)}) - v["c"]  # (C/6)^-exponent is 1 here
    exponent = dense["alpha"] * dense["beta"] / (dense["alpha"] + dense["beta"])
    return 6 * (unit / reached) ** (1 / exponent) / x["C"]


LAWS = (
    Law(
        name="joint-moe",
        title="Joint law of dense and mixture-of-experts models",
        formula=JOINT.formula,
        source="arXiv 2502.05172, equation 6, table 3",
        corpus="FineWeb-Edu",
        log_base="natural",
        evidence="primary",
        constants={
            "a": Constant(35.91, "35.91"),
            "alpha": Constant(-0.1889, "-0.1889"),
            "delta": Constant(-0.2285, "-0.2285"),
            "gamma": Constant(0.0098, "0.0098"),
            "b": Constant(35.98, "35.98"),
            "beta": Constant(-0.1775, "-0.1775"),
            "omega": Constant(0.5529, "0.5529"),
            "zeta": Constant(-0.0259, "-0.0259"),
            "E_start": Constant(2.0732, "2.0732"),
            "E_max": Constant(290.4521, "290.4521"),
            "c": Constant(1.3637, "1.3637"),
        },
        variables={
            "N": Variable("active parameters, embeddings included", "parameters", 1e8, 2.7e9),
            "D": Variable("training tokens", "tokens", 1e9, 80e9),
            "E": Variable("experts, one a token; 1 = dense, where Ehat = E_start", "experts", 1, 32),
            "C": Variable("training FLOPs, 6 N D", "FLOPs", 1e18, 1.3e21),
        },
        quantities=(
            Quantity("loss", "nats per token", ("N", "D", "E"), _loss),
            Quantity(
                "optimal_parameters",
                "parameters",
                ("C", "E"),
                lambda v, x: _optimum(v, x)["N"],
                "active N of the least loss",
                derives=_optimum,
            ),
            Quantity("optimal_tokens", "tokens", ("C", "E"), lambda v, x: _optimum(v, x)["D"], derives=_optimum),
            Quantity(
                "tokens_per_parameter",
                "D/N",
                ("C", "E"),
                lambda v, x: _optimum(v, x)["D"] / _optimum(v, x)["N"],
                dimensionless=True,
                derives=_optimum,
            ),
            Quantity(
                "compute_multiplier",
                "C_dense/C",
                ("C", "E"),
                _compute_multiplier,
                "FLOPs of the best dense model of this loss",
                dimensionless=True,
                derives=_optimum,
            ),
        ),
        notes=(
            "the lower ends of the ranges of N, D and C are approximate; the corpus was not checked",
            "the optima repeat the paper's table 1 within its digits",
        ),
        form=JOINT,
    ),
)
