"""Guo: only compute counts (arXiv 2404.19484), with its two predictions, and power laws of C that compete with it.

N parameters, D training tokens. Bits per character (BPC) are linear in ln(N D), N in 1e9 and D in 1e12.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable


def _product(x: Inputs) -> Array:
    return np.log(x["N"] / 1e9 * x["D"] / 1e12)


def bits(v: Values, x: Inputs) -> Array:
    """BPC = m ln(N D) + q."""
    return v["m"] * _product(x) + v["q"]


def product_for(v: Values, x: Inputs) -> Array:
    """N D for a BPC."""
    return np.exp((x["BPC"] - v["q"]) / v["m"]) * 1e21


LINE = Form(
    "compute-only", "BPC = m ln(N D) + q", ("N", "D"), (), (Linear("m", positive=False), Linear("q", positive=False)), bits,
    lambda v, x: np.stack([_product(x), np.ones_like(x["N"])], axis=1),
)  # fmt: skip
POWER = Form(
    "compute-power", "L = (C_c / (N D))^alpha", ("N", "D"), (Parameter("alpha", 0.01, 0.5, least=1e-4, most=2.0),),
    (Linear("C_c", of=lambda coefficient, v: coefficient ** (1 / v["alpha"])),),
    lambda v, x: (v["C_c"] / (x["N"] * x["D"])) ** v["alpha"],
    lambda v, x: ((x["N"] * x["D"]) ** -v["alpha"])[:, None],
)  # fmt: skip
FLOOR = Form(
    "compute-power-floor", "L = E + (C_c / (N D))^alpha", ("N", "D"), (Parameter("alpha", 0.01, 1.0, least=1e-4, most=2.0),),
    (Linear("E"), Linear("C_c", of=lambda coefficient, v: coefficient ** (1 / v["alpha"]))),
    lambda v, x: v["E"] + (v["C_c"] / (x["N"] * x["D"])) ** v["alpha"],
    lambda v, x: np.stack([np.ones_like(x["N"]), (x["N"] * x["D"]) ** -v["alpha"]], axis=1),
)  # fmt: skip

FORMS = (LINE, POWER, FLOOR)

LAWS = (
    Law(
        name="compute-only",
        title="Only compute counts",
        formula=LINE.formula + ", N in 1e9, D in 1e12",
        source="form: arXiv 2404.19484, figure 1; constants: our fit of 18 models of the leaderboard of arXiv 2404.09937",
        corpus="compression leaderboard: Common Crawl, Python, arXiv-Math",
        log_base="natural",
        evidence="fitted here",
        constants={"m": Constant(-0.0308), "q": Constant(0.5728)},
        variables={
            "N": Variable("parameters, as the models' authors state them; of dense models", "parameters", 6e9, 73e9),
            "D": Variable("training tokens, as stated", "tokens", 1e12, 15e12),
            "C": Variable("training FLOPs, 6 N D", "FLOPs", 4e22, 6.4e24),
            "BPC": Variable("bits per character to reach", "bits", 0.35, 0.53),
            "N2": Variable("another number of parameters", "parameters", 6e9, 73e9),
            "D/N": Variable("tokens a parameter", "ratio", 4, 100),
        },
        quantities=(
            Quantity("bits_per_character", "bits", ("N", "D"), bits),
            Quantity("bits_per_character_at_compute", "bits", ("C",), lambda v, x: v["m"] * np.log(x["C"] / 6e21) + v["q"]),
            Quantity(
                "equal_quality_tokens",
                "tokens",
                ("N", "D", "N2"),
                lambda v, x: x["N"] * x["D"] / x["N2"],
                "what N2 needs: prediction (a)",
                derives=lambda v, x: {"N": x["N2"], "D": x["N"] * x["D"] / x["N2"]},
            ),
            Quantity(
                "serving_ratio",
                "N2/N",
                ("N", "N2"),
                lambda v, x: x["N2"] / x["N"],
                "FLOPs to serve a token: prediction (a)",
                dimensionless=True,
            ),
            Quantity(
                "needed_parameters",
                "parameters",
                ("BPC", "D"),
                lambda v, x: product_for(v, x) / x["D"],
                "with D capped: prediction (b)",
                derives=lambda v, x: {"N": product_for(v, x) / x["D"], "D": x["D"]},
            ),
            Quantity(
                "needed_compute",
                "FLOPs",
                ("BPC",),
                lambda v, x: 6 * product_for(v, x),
                derives=lambda v, x: {"C": 6 * product_for(v, x)},
            ),
        ),
        notes=(
            "the paper's own constants could not be read; a recalled pair, m = -0.031 and q = 0.572, agrees to the third decimal",
            "prediction (a), N D constant at equal quality, has no interior optimum: data or the least useful N must bound it",
            "models of many laboratories: newer ones have more compute and better data; where N and D were varied on purpose it fails",
            "the line must bend: it reaches 0.30 at 4.2e25 FLOPs",
        ),
        form=LINE,
    ),
)
