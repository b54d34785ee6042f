"""Muennighoff et al.: repeated tokens and excess parameters are worth less (arXiv 2305.16264, equations 5, 6 and 17).

U unique tokens, D tokens in all epochs. U_N is the N that U tokens are optimal for.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.form import Array, Form, Inputs, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable


def _decayed(unique: Array, total: Array, decay: float) -> Array:
    """unique + unique R* (1 - exp(-R/R*)), R = total/unique - 1."""
    repeats = np.maximum(total / unique - 1, 0)
    return unique + unique * decay * -np.expm1(-repeats / decay)


def _effective_tokens(v: Values, x: Inputs) -> Array:
    return _decayed(np.minimum(x["U"], x["D"]), x["D"], v["R_D"])


def _effective_parameters(v: Values, x: Inputs) -> Array:
    scale = (v["alpha"] * v["A"] / (v["beta"] * v["B"])) ** (1 / (v["alpha"] + v["beta"]))
    useful = (np.minimum(x["U"], x["D"]) * scale) ** (v["beta"] / v["alpha"]) * scale
    return _decayed(np.minimum(x["N"], useful), x["N"], v["R_N"])


def _loss(v: Values, x: Inputs) -> Array:
    parameters, tokens = _effective_parameters(v, x), _effective_tokens(v, x)
    return v["E"] + v["A"] * parameters ** -v["alpha"] + v["B"] * tokens ** -v["beta"]


REPETITION = Form(
    "muennighoff", "L = E + A/N'^alpha + B/D'^beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' likewise with U_N", ("N", "D", "U"),
    (
        Parameter("E", 1.0, 2.5), Parameter("A", 50, 5e3, least=1, most=1e6), Parameter("B", 50, 5e3, least=1, most=1e6),
        Parameter("alpha", 0.2, 0.6, least=1e-2, most=2.0), Parameter("beta", 0.2, 0.6, least=1e-2, most=2.0),
        Parameter("R_D", 2, 50, least=0.1, most=1e4), Parameter("R_N", 2, 50, least=0.1, most=1e4),
    ),
    (), _loss,
)  # fmt: skip

FORMS = (REPETITION,)

LAWS = (
    Law(
        name="muennighoff",
        title="Repeated data",
        formula=REPETITION.formula,
        source="arXiv 2305.16264, equations 5, 6, 17; README of huggingface/datablations",
        corpus="C4, GPT-2 tokenizer",
        log_base="none",
        evidence="primary",
        constants={
            "E": Constant(float(np.exp(0.6254804)), "1.87", "exp(0.6254804)"),
            "A": Constant(float(np.exp(6.255414)), "521", "exp(6.255414)"),
            "B": Constant(float(np.exp(7.3049974)), "1488", "exp(7.3049974)"),
            "alpha": Constant(0.3526596, "0.353"),
            "beta": Constant(0.3526596, "0.353", "tied to alpha in the fit"),
            "R_D": Constant(15.387756, "15.4"),
            "R_N": Constant(5.309743, "5.3"),
        },
        variables={
            "N": Variable("parameters, as the authors name their models", "parameters", 7e6, 9e9),
            "D": Variable("training tokens, all epochs", "tokens", 1e8, 9e11),
            "U": Variable("unique training tokens", "tokens", 1e8, 9e11),
            "D/U": Variable("epochs", "ratio", 1, 1500),
        },
        quantities=(
            Quantity("loss", "nats per token", ("N", "D", "U"), _loss),
            Quantity(
                "effective_tokens_ratio",
                "D'/D",
                ("D", "U"),
                lambda v, x: _effective_tokens(v, x) / x["D"],
                "worth of a token beside a fresh one, mean",
                dimensionless=True,
            ),
            Quantity(
                "useful_parameters_ratio",
                "N'/N",
                ("N", "D", "U"),
                lambda v, x: _effective_parameters(v, x) / x["N"],
                "below 1 where N is too large for U",
                dimensionless=True,
            ),
        ),
        notes=(
            "the authors: use the trend of the loss, not its value; equation 17 explains 77 % of the variance of its 182 runs",
            "runs in which more epochs or parameters raised the loss were left out of the fit: the law cannot show overfitting",
            "U may not exceed D; a larger U is taken as D",
            "the ends of the range of D and U are approximate",
        ),
        form=REPETITION,
    ),
)
