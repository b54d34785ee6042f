"""ParScale: P parallel streams act like more parameters (arXiv 2505.10475, equation 5), and forms that compete with it.

N counts parameters without embeddings, with the streams' own prefixes and aggregator; P streams.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable


def multiplier(v: Values, x: Inputs) -> Array:
    """N_eff/N = k ln P + 1."""
    return v["k"] * np.log(x["P"]) + 1


def _loss(v: Values, x: Inputs) -> Array:
    return v["E"] + (v["A"] / (x["N"] * multiplier(v, x))) ** v["alpha"]


def _columns(v: Values, x: Inputs) -> Array:
    return np.stack([np.ones_like(x["N"]), (x["N"] * multiplier(v, x)) ** -v["alpha"]], axis=1)


FLOOR = Linear("E")
SCALE = Linear("A", of=lambda coefficient, v: coefficient ** (1 / v["alpha"]))
"""the coefficient is A^alpha"""

PARSCALE = Form(
    "parscale", "L = E + (A / (N (k ln P + 1)))^alpha", ("N", "P"),
    (Parameter("k", 0.05, 2.0), Parameter("alpha", 0.05, 1.0, least=1e-3, most=5.0)), (FLOOR, SCALE), _loss, _columns,
)  # fmt: skip


def _shared(v: Values, x: Inputs) -> Array:
    return ((x["P"] - 1) * v["rho"] + 1) / x["P"]


CORRELATION = Form(
    "parscale-correlation", "L = E + (A/N)^alpha ((P-1) rho + 1)/P", ("N", "P"),
    (Parameter("rho", 0.3, 0.99, most=1.0), Parameter("alpha", 0.05, 1.0, least=1e-3, most=5.0)), (FLOOR, SCALE),
    lambda v, x: v["E"] + (v["A"] / x["N"]) ** v["alpha"] * _shared(v, x),
    lambda v, x: np.stack([np.ones_like(x["N"]), x["N"] ** -v["alpha"] * _shared(v, x)], axis=1),
)  # fmt: skip
"""Proposition 1 of the paper with one correlation rho between the streams' residuals; the paper finds it worse."""

ADDITIVE = Form(
    "parscale-additive", "L = E + A N^-alpha + B P^-beta", ("N", "P"),
    (Parameter("alpha", 0.05, 1.0, least=1e-3, most=5.0), Parameter("beta", 0.05, 2.0, least=1e-3, most=5.0)),
    (Linear("E"), Linear("A"), Linear("B")),
    lambda v, x: v["E"] + v["A"] * x["N"] ** -v["alpha"] + v["B"] * x["P"] ** -v["beta"],
    lambda v, x: np.stack([np.ones_like(x["N"]), x["N"] ** -v["alpha"], x["P"] ** -v["beta"]], axis=1),
)  # fmt: skip
"""Not of the paper: the gain of streams does not depend on N."""

FORMS = (PARSCALE, CORRELATION, ADDITIVE)

_QUANTITIES = (
    Quantity("loss", "nats per token", ("N", "P"), _loss),
    Quantity("stream_parameters_ratio", "N_eff/N", ("P",), multiplier, "k ln P + 1", dimensionless=True),
)
_VARIABLES = {
    "N": Variable("parameters without embeddings, with prefixes and aggregator", "parameters", 535_813_376, 4_414_502_408),
    "P": Variable("parallel streams", "streams", 1, 8),
}
_NOTES = (
    "D was 42B tokens in every run: the law says nothing about other D, and k may change with D",
    "ln P, a constant correlation and a sum cannot be told apart for P <= 8: compare them with `laws compare`",
    "the constants are those of the paper's figure 2; its own script, run again, gives them within 6e-4",
)


def _law(name: str, corpus: str, constants: dict[str, str]) -> Law:
    return Law(
        name=name,
        title=f"ParScale, {corpus}",
        formula=PARSCALE.formula,
        source="arXiv 2505.10475, equation 5 and figure 2; parametric_fit.py of QwenLM/ParScale",
        corpus=f"{corpus}, Qwen2 tokenizer, training loss",
        log_base="natural",
        evidence="primary",
        constants={symbol: Constant(float(value), value) for symbol, value in constants.items()},
        variables=_VARIABLES,
        quantities=_QUANTITIES,
        notes=_NOTES,
        form=PARSCALE,
    )


LAWS = (
    _law("parscale-stack", "Stack-V2-Python", {"E": "0.6912", "A": "1.131e7", "k": "0.3935", "alpha": "0.1894"}),
    _law("parscale-pile", "Pile", {"E": "1.2888", "A": "1.974e8", "k": "0.3345", "alpha": "0.1963"}),
)
