"""Ling: efficiency leverage of mixtures of experts (arXiv 2507.17702, equation 13).

EL = FLOPs of the dense model over those of the mixture at equal loss; A activated share of the experts, G granularity = 2 d_model over
the expert's width, C training FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megascale.laws.families.effective_parameters import saturated
from megascale.laws.form import Array, Inputs, Values
from megascale.laws.law import Constant, Law, Quantity, Variable


def leverage(v: Values, x: Inputs) -> Array:
    """EL = Ahat^(a + d log C + gamma (log G)^2 + beta log G)."""
    share = saturated(x["A"] + 1, v["A_start"], v["A_max"])  # saturates A as Ehat does E - 1
    g = np.log2(x["G"])
    return share ** (v["a"] + v["d"] * np.log10(x["C"]) + v["gamma"] * g**2 + v["beta"] * g)


def _power(name: str) -> Callable[[Values, Inputs], Array]:
    """A power law of C: the constant of that name times C to the constant of that name with _power."""
    return lambda v, x: v[name] * x["C"] ** v[f"{name}_power"]


LAWS = (
    Law(
        name="ling-leverage",
        title="Efficiency leverage",
        formula="EL = Ahat^(a + d log10 C + gamma (log2 G)^2 + beta log2 G)",
        source="arXiv 2507.17702, equation 13, table 2",
        corpus="Ant Group's corpus",
        log_base="10 for C, 2 for G",
        evidence="primary",
        constants={
            "a": Constant(1.23, "1.23"),
            "d": Constant(-7.61e-2, "-7.61e-2"),
            "gamma": Constant(1.67e-2, "1.67e-2"),
            "beta": Constant(-1.17e-1, "-1.17e-1"),
            "A_start": Constant(1.63e-2, "1.63e-2"),
            "A_max": Constant(5.28e16, "5.28e16"),
            "M_dense": Constant(0.0655, "0.0655"),
            "M_dense_power": Constant(0.5422, "0.5422"),
            "D_dense": Constant(15.2582, "15.2582"),
            "D_dense_power": Constant(0.4578, "0.4578"),
            "M_moe": Constant(0.1915, "0.1915"),
            "M_moe_power": Constant(0.5095, "0.5095"),
            "D_moe": Constant(5.2232, "5.2232"),
            "D_moe_power": Constant(0.4905, "0.4905"),
        },
        variables={
            "A": Variable("activated share of the experts", "share", 0.008, 1),
            "G": Variable("granularity: 2 d_model over the expert's width", "ratio", 2, 16),
            "C": Variable("training FLOPs", "FLOPs", 1e18, 1e22),
        },
        quantities=(
            Quantity("compute_multiplier", "C_dense/C", ("A", "G", "C"), leverage, "efficiency leverage", dimensionless=True),
            Quantity(
                "dense_flops_per_token",
                "FLOPs",
                ("C",),
                _power("M_dense"),
                "of the best dense model (table 1)",
            ),
            Quantity("dense_tokens", "tokens", ("C",), _power("D_dense"), "of the best dense model (table 1)"),
            Quantity("moe_flops_per_token", "FLOPs", ("C",), _power("M_moe"), "of the best mixture (table 1)"),
            Quantity("moe_tokens", "tokens", ("C",), _power("D_moe"), "of the best mixture (table 1)"),
        ),
        notes=(
            "the bases of the logarithms are not stated: only log2 of G and log10 of C repeat the text, EL > 7 at A 3.1 %, G 12, C 1e22",
            "the ends of the ranges are approximate; C = 1e22 is the paper's own extrapolation",
            "table 1 counts C as FLOPs per token (without embeddings) times tokens",
        ),
    ),
)
