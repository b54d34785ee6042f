"""Effective Parameter Count of a routed model, and the size at which routing stops helping (arXiv 2202.01169, equation 11).

N parameters that one token sees, E experts, Ehat the saturated number of experts. Logarithms are base 10.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.form import Array, Inputs, Values


def saturated(experts: Array, start: float, most: float) -> Array:
    """Ehat: 1/Ehat = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max. Ehat(1) = E_start, and Ehat tends to E_max."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def effective_parameters(v: Values, x: Inputs) -> Array:
    """Nbar: the N of the dense model with the loss of a routed one. Nbar(N, 1) = N exactly.

    N^(s(Ehat)/s(E_start)) (Ehat/E_start)^(b/s(E_start)), s(e) = a + c log e.
    """
    experts = saturated(x["E"], v["E_start"], v["E_max"])
    dense = v["a"] + v["c"] * np.log10(v["E_start"])
    return x["N"] ** ((v["a"] + v["c"] * np.log10(experts)) / dense) * (experts / v["E_start"]) ** (v["b"] / dense)


def cutoff(v: Values) -> float:
    """N from which on more experts do not help, 10^(-b/c); infinite where c is not positive."""
    with np.errstate(over="ignore"):
        return float(np.float64(10) ** (-v["b"] / v["c"])) if v["c"] > 0 else float("inf")
