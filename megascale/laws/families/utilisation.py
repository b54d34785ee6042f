"""The (F, B) form of the routed law: one fit for any number of experts per token and routed blocks (arXiv 2202.01169, equation 2).

F TFLOPs per token of the forward pass; B = P/F, parameters per FLOP of a token (P all parameters without embeddings).
"""

from __future__ import annotations

import numpy as np

from megascale.laws.families.effective_parameters import saturated
from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable

LEAST_B = 0.194
"""the smallest B of the published runs: the part that E = 1 plays in Ehat"""


def _parts(v: Values, x: Inputs) -> tuple[Array, Array]:
    return np.log10(x["F"]), np.log10(saturated(x["B"] - LEAST_B + 1, v["B_start"], v["B_max"]))


def _loss(v: Values, x: Inputs) -> Array:
    f, b = _parts(v, x)
    return 10 ** (v["a"] * f + v["b"] * b + v["c"] * f * b + v["d"])


def _columns(v: Values, x: Inputs) -> Array:
    f, b = _parts(v, x)
    return float(np.log(10)) * np.stack([f, b, f * b, np.ones_like(f)], axis=1)


FORM = Form(
    "utilisation", "log L = a log F + b log Bhat + c log F log Bhat + d, Bhat saturates B - 0.194 as Ehat does E - 1", ("F", "B"),
    (Parameter("B_start", 0.05, 1.0, least=0.01, most=5.0), Parameter("B_max", 6.0, 100.0, least=5.0, most=1e6)),
    tuple(Linear(name, positive=False) for name in "abcd"), _loss, _columns, "log loss", size="F",
)  # fmt: skip

FORMS = (FORM,)

LAWS = (
    Law(
        name="utilisation-s-base",
        title="Routed models by FLOPs and parameter utilisation, S-BASE",
        formula=FORM.formula,
        source="form: arXiv 2202.01169, equation 2; constants: our fit of the published runs",
        corpus="MassiveText, vocabulary of 32,000",
        log_base="10",
        evidence="fitted here",
        constants={
            "a": Constant(-0.0808),
            "b": Constant(-0.0066),
            "c": Constant(0.0103),
            "d": Constant(0.1314),
            "B_start": Constant(0.151),
            "B_max": Constant(15.1),
        },
        variables={
            "F": Variable("forward TFLOPs per token", "TFLOP", 5e-5, 4e-3),
            "B": Variable("parameters per FLOP of a token's forward pass", "1/FLOP", LEAST_B, 60),
        },
        quantities=(Quantity("loss", "nats per token", ("F", "B"), _loss),),
        notes=(
            "the paper's constants of this form and its saturation of B could not be read: both are ours, not comparable with its table",
            "130B tokens in every run",
        ),
        form=FORM,
    ),
)
