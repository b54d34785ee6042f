"""Kaplan et al. (arXiv 2001.08361): single power laws, the joint law of N and D, and the one of N and steps.

N parameters without embeddings, D tokens, C training FLOPs of the best allocation, S optimizer steps at a batch far above the critical one.
"""

from __future__ import annotations

from megascale.laws.form import Array, Form, Inputs, Parameter, Values
from megascale.laws.law import Constant, Law, Quantity, Variable

PETAFLOP_DAY = 1e15 * 86_400


def _joint(v: Values, x: Inputs) -> Array:
    return ((v["N_c"] / x["N"]) ** (v["alpha_N"] / v["alpha_D"]) + v["D_c"] / x["D"]) ** v["alpha_D"]


JOINT = Form(
    "kaplan", "L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D", ("N", "D"),
    (
        Parameter("N_c", 1e11, 1e16), Parameter("D_c", 1e11, 1e16), Parameter("alpha_N", 0.03, 0.3, least=1e-3, most=2.0),
        Parameter("alpha_D", 0.03, 0.3, least=1e-3, most=2.0),
    ),
    (), _joint,
)  # fmt: skip

FORMS = (JOINT,)

_N = Variable("parameters without embeddings", "parameters", 768, 1.5e9)
_D = Variable("tokens of the data set", "tokens", 2.2e7, 2.3e10)
_NOTES = (
    "learning-rate schedules were not matched to D, and small models counted without their head: arXiv 2406.19146 corrects both",
    "the ends of the ranges were not checked",
)

LAWS = (
    Law(
        name="kaplan-parameters",
        title="Kaplan, parameters alone",
        formula="L = (N_c/N)^alpha_N",
        source="arXiv 2001.08361, equation 1.1",
        corpus="WebText2",
        log_base="none",
        evidence="secondary",
        constants={"N_c": Constant(8.8e13, "8.8e13"), "alpha_N": Constant(0.076, "0.076")},
        variables={"N": _N},
        quantities=(Quantity("loss", "nats per token", ("N",), lambda v, x: (v["N_c"] / x["N"]) ** v["alpha_N"]),),
        notes=_NOTES,
    ),
    Law(
        name="kaplan-data",
        title="Kaplan, data alone",
        formula="L = (D_c/D)^alpha_D",
        source="arXiv 2001.08361, equation 1.2",
        corpus="WebText2",
        log_base="none",
        evidence="secondary",
        constants={"D_c": Constant(5.4e13, "5.4e13"), "alpha_D": Constant(0.095, "0.095")},
        variables={"D": _D},
        quantities=(Quantity("loss", "nats per token", ("D",), lambda v, x: (v["D_c"] / x["D"]) ** v["alpha_D"]),),
        notes=_NOTES,
    ),
    Law(
        name="kaplan-compute",
        title="Kaplan, compute alone",
        formula="L = (C_c/C_min)^alpha_C, C in PF-days",
        source="arXiv 2001.08361, equation 1.3",
        corpus="WebText2",
        log_base="none",
        evidence="secondary",
        constants={"C_c": Constant(3.1e8, "3.1e8"), "alpha_C": Constant(0.050, "0.050")},
        variables={"C": Variable("least training FLOPs for the loss, embeddings left out (1 PF-day = 8.64e19)", "FLOPs")},
        quantities=(Quantity("loss", "nats per token", ("C",), lambda v, x: (v["C_c"] * PETAFLOP_DAY / x["C"]) ** v["alpha_C"]),),
        notes=_NOTES,
    ),
    Law(
        name="kaplan",
        title="Kaplan, parameters and data",
        formula=JOINT.formula,
        source="arXiv 2001.08361, equation 1.5",
        corpus="WebText2",
        log_base="none",
        evidence="secondary",
        constants={
            "N_c": Constant(6.4e13, "6.4e13"),
            "D_c": Constant(1.8e13, "1.8e13"),
            "alpha_N": Constant(0.076, "0.076"),
            "alpha_D": Constant(0.103, "0.103"),
        },
        variables={"N": _N, "D": _D},
        quantities=(Quantity("loss", "nats per token", ("N", "D"), _joint),),
        notes=_NOTES,
        form=JOINT,
    ),
    Law(
        name="kaplan-steps",
        title="Kaplan, parameters and steps",
        formula="L = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S; B_crit = B_star L^(-1/alpha_B)",
        source="arXiv 2001.08361, equations 1.4 and 1.6",
        corpus="WebText2",
        log_base="none",
        evidence="secondary",
        constants={
            "N_c": Constant(8.8e13, "8.8e13", "of the law of N alone"),
            "alpha_N": Constant(0.076, "0.076"),
            "S_c": Constant(2.1e3, "2.1e3"),
            "alpha_S": Constant(0.76, "0.76"),
            "B_star": Constant(2e8, "2e8"),
            "alpha_B": Constant(0.21, "0.21"),
        },
        variables={
            "N": _N,
            "S": Variable("optimizer steps, adjusted to a batch far above the critical one", "steps"),
            "L": Variable("loss", "nats per token"),
        },
        quantities=(
            Quantity(
                "loss",
                "nats per token",
                ("N", "S"),
                lambda v, x: (v["N_c"] / x["N"]) ** v["alpha_N"] + (v["S_c"] / x["S"]) ** v["alpha_S"],
            ),
            Quantity("critical_batch", "tokens", ("L",), lambda v, x: v["B_star"] * x["L"] ** (-1 / v["alpha_B"])),
        ),
        notes=(*_NOTES, "the paper's table for this law was not read: N_c and alpha_N are those of the law of N alone"),
    ),
)
