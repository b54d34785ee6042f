"""Besiroglu et al.: Chinchilla's third approach fitted again to the points of its figure 4 (arXiv 2404.10102)."""

from __future__ import annotations

from megascale.laws.families.additive import ADDITIVE, LOSS, OPTIMUM, SERVED, SHARE
from megascale.laws.families.chinchilla import VARIABLES
from megascale.laws.law import Constant, Law

LAWS = (
    Law(
        name="besiroglu",
        title="Chinchilla replicated",
        formula=ADDITIVE.formula,
        source="arXiv 2404.10102, equation 5 (240 points)",
        corpus="MassiveText",
        log_base="none",
        evidence="secondary",
        constants={
            "E": Constant(1.8172, "1.8172", note="standard error 0.03"),
            "A": Constant(482.01, "482.01", note="standard error 125"),
            "B": Constant(2085.43, "2085.43", note="standard error 1293"),
            "alpha": Constant(0.3478, "0.3478", note="standard error 0.02"),
            "beta": Constant(0.3658, "0.3658", note="standard error 0.02"),
        },
        variables=VARIABLES,
        quantities=(LOSS, SHARE, *OPTIMUM, *SERVED),
        notes=(
            "A and B are known to 26 % and 62 % only, alpha and beta with them: use losses and allocations, not single constants",
            "the equation number was not checked",
        ),
        form=ADDITIVE,
    ),
)
