"""Krajewski et al.: fine-grained mixtures of experts (arXiv 2402.07871, equation 9).

N total parameters (see the notes), D tokens, G granularity = width of the dense feed-forward over that of an expert; 64 expansion.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.families.additive import loss as dense_loss
from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable


def _loss(v: Values, x: Inputs) -> Array:
    return v["c"] + (v["g"] * x["G"] ** -v["gamma"] + v["a"]) * x["N"] ** -v["alpha"] + v["b"] * x["D"] ** -v["beta"]


def _columns(v: Values, x: Inputs) -> Array:
    size = x["N"] ** -v["alpha"]
    return np.stack([np.ones_like(size), size * x["G"] ** -v["gamma"], size, x["D"] ** -v["beta"]], axis=1)


def _exponent(name: str, low: float, high: float) -> Parameter:
    return Parameter(name, low, high, least=1e-3, most=5.0)


FINE_GRAINED = Form(
    "krajewski", "L = c + (g/G^gamma + a)/N^alpha + b/D^beta", ("N", "D", "G"),
    (_exponent("alpha", 0.05, 0.6), _exponent("beta", 0.05, 0.6), _exponent("gamma", 0.1, 2.0)),
    (Linear("c"), Linear("g"), Linear("a"), Linear("b")), _loss, _columns,
)  # fmt: skip

FORMS = (FINE_GRAINED,)

_VARIABLES = {
    "N": Variable("apparently all parameters, experts included, without embeddings (not verified)", "parameters", 129e6, 3.7e9),
    "D": Variable("training tokens", "tokens", 16e9, 130e9),
    "G": Variable("granularity: dense feed-forward width over expert width", "ratio", 1, 16),
}
_SOURCE = "arXiv 2402.07871, equation 9, table 1"
_NOTES = (
    "what N counts was not verified: with equal N the mixture's loss lies above the dense one's, so it cannot be the active count",
    "whether the range of N is of active or total parameters was not verified either",
    "G here is d_ff over the expert's width; arXiv 2507.17702 writes 2 d_model over it",
    "fitted with Huber delta 0.1, RMSE 0.015 (0.019 on held-out runs)",
)


def _constants(**printed: str) -> dict[str, Constant]:
    return {symbol: Constant(float(value), value) for symbol, value in printed.items()}


LAWS = (
    Law(
        name="krajewski",
        title="Fine-grained mixture of experts, E = 64",
        formula=FINE_GRAINED.formula,
        source=_SOURCE,
        corpus="C4 (not verified)",
        log_base="none",
        evidence="not verified",
        constants=_constants(c="0.47", g="2.1", gamma="0.58", a="18.1", alpha="0.115", b="30.8", beta="0.147"),
        variables=_VARIABLES,
        quantities=(Quantity("loss", "nats per token", ("N", "D", "G"), _loss),),
        notes=_NOTES,
        form=FINE_GRAINED,
    ),
    Law(
        name="krajewski-dense",
        title="The dense models beside them",
        formula="L = E + A/N^alpha + B/D^beta",
        source=_SOURCE,
        corpus="C4 (not verified)",
        log_base="none",
        evidence="secondary",
        constants=_constants(E="0.47", A="16.3", alpha="0.126", B="26.7", beta="0.127"),
        variables={"N": Variable("parameters, without embeddings", "parameters", 129e6, 3.7e9), "D": _VARIABLES["D"]},
        quantities=(Quantity("loss", "nats per token", ("N", "D"), dense_loss),),
        notes=("exponents near zero make E unsure",),
    ),
)
