"""Sardana et al.: training and serving together (arXiv 2401.00448), and their refit with up to 10,000 tokens a parameter.

Laws of the additive form know I, the tokens served; this one brings the constants of the over-trained runs.
"""

from __future__ import annotations

from megascale.laws.families.additive import ADDITIVE, LOSS, OPTIMUM, SERVED, SHARE
from megascale.laws.law import Constant, Law, Variable

LAWS = (
    Law(
        name="sardana",
        title="Inference-aware, over-trained runs",
        formula="min 6 N D + 2 N I  subject to  E + A/N^alpha + B/D^beta = L",
        source="arXiv 2401.00448, equation 3; table 1, all data",
        corpus="not verified",
        log_base="none",
        evidence="secondary",
        constants={
            "E": Constant(1.45, "1.45"),
            "A": Constant(33.66, "33.66"),
            "B": Constant(138.9, "138.9"),
            "alpha": Constant(0.18, "0.18"),
            "beta": Constant(0.24, "0.24"),
        },
        variables={
            "N": Variable("parameters; whether with embeddings was not checked", "parameters", 150e6, 6e9),
            "D": Variable("training tokens", "tokens", 1.5e9, 1.5e12),
            "C": Variable("training FLOPs, 6 N D", "FLOPs"),
            "I": Variable("tokens served at inference", "tokens"),
            "D/N": Variable("tokens a parameter", "ratio", 10, 10_000),
        },
        quantities=(*SERVED, LOSS, SHARE, *OPTIMUM),
        notes=(
            "the constants depend on which runs are fitted: with at most 100 tokens a parameter table 1 has alpha 0.08, beta 0.13",
            "exponents with two digits: do not extrapolate",
            "the paper's own examples use the constants of the law chinchilla; ask that law for C and I to repeat them",
        ),
        form=ADDITIVE,
    ),
)
