"""The form L = E + A/N^alpha + B/D^beta that many laws share, and what follows from it.

N parameters, D training tokens, C training FLOPs = 6 N D, I tokens served at inference.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values
from megascale.laws.law import Quantity


def loss(v: Values, x: Inputs) -> Array:
    """L(N, D)."""
    return v["E"] + v["A"] * x["N"] ** -v["alpha"] + v["B"] * x["D"] ** -v["beta"]


ADDITIVE = Form(
    "chinchilla", "L = E + A/N^alpha + B/D^beta", ("N", "D"),
    (Parameter("alpha", 0.1, 1.0, least=1e-3, most=5.0), Parameter("beta", 0.1, 1.0, least=1e-3, most=5.0)),
    (Linear("E"), Linear("A"), Linear("B")), loss,
    lambda v, x: np.stack([np.ones_like(x["N"]), x["N"] ** -v["alpha"], x["D"] ** -v["beta"]], axis=1),
)  # fmt: skip


def optimal_parameters(v: Values, x: Inputs) -> Array:
    """N of the least loss for C = 6 N D: G (C/6)^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)).

    arXiv 2203.15556, equation 4.
    """
    total = v["alpha"] + v["beta"]
    return (v["alpha"] * v["A"] / (v["beta"] * v["B"])) ** (1 / total) * (x["C"] / 6) ** (v["beta"] / total)


def optimal_tokens(v: Values, x: Inputs) -> Array:
    """D that goes with it."""
    return x["C"] / 6 / optimal_parameters(v, x)


def optimal_loss(v: Values, x: Inputs) -> Array:
    """The loss there."""
    return loss(v, {"N": optimal_parameters(v, x), "D": optimal_tokens(v, x)})


def compute_share(v: Values, x: Inputs) -> Array:
    """The part of C = 6 N D that would reach the same loss with the best N and D: 1 at the optimum."""
    reducible = loss(v, x) - v["E"]
    unit = {"C": np.asarray([6.0])}  # (C/6)^-gamma is 1 here
    gamma = v["alpha"] * v["beta"] / (v["alpha"] + v["beta"])
    return ((optimal_loss(v, unit) - v["E"]) / reducible) ** (1 / gamma) / (x["N"] * x["D"])


def served_parameters(v: Values, x: Inputs) -> Array:
    """N that reaches the loss of the optimum for C with the fewest FLOPs of training and serving, 6 N D + 2 N I.

    (arXiv 2401.00448, equation 3; the condition is alpha A N^-alpha / (beta B D^-beta) = 1 + I/(3 D).)
    """
    budget, served = np.broadcast_arrays(x["C"], x["I"])
    found = [_cheapest(v, float(c), float(i)) for c, i in zip(budget.ravel(), served.ravel(), strict=True)]
    return np.asarray(found).reshape(budget.shape)


def served_tokens(v: Values, x: Inputs) -> Array:
    """D that goes with it."""
    return _tokens_for(v, served_parameters(v, x), optimal_loss(v, x))


def served_saving(v: Values, x: Inputs) -> Array:
    """Share of the FLOPs of training and serving that this saves over the optimum for C."""
    parameters, tokens = served_parameters(v, x), served_tokens(v, x)
    plain = x["C"] + 2 * optimal_parameters(v, x) * x["I"]
    return 1 - (6 * parameters * tokens + 2 * parameters * x["I"]) / plain


def _tokens_for(v: Values, parameters: Array, target: Array) -> Array:
    return ((target - v["E"] - v["A"] * parameters ** -v["alpha"]) / v["B"]) ** (-1 / v["beta"])


def _cheapest(v: Values, budget: float, served: float) -> float:
    x = {"C": np.asarray(budget)}
    target, plain = optimal_loss(v, x), float(optimal_parameters(v, x))
    # Below this N the loss cannot be reached with any D.
    least = (v["A"] / float(target - v["E"])) ** (1 / v["alpha"])

    def condition(log_n: float) -> float:
        n = np.asarray(np.exp(log_n))
        d = _tokens_for(v, n, target)
        return float(
            np.log(v["alpha"] * v["A"] * n ** -v["alpha"] / (v["beta"] * v["B"] * d ** -v["beta"])) - np.log1p(served / (3 * d))
        )

    return float(np.exp(brentq(condition, np.log(least * (1 + 1e-9)), np.log(plain) + 1e-6)))


def _optimum(v: Values, x: Inputs) -> Inputs:
    return {"N": optimal_parameters(v, x), "D": optimal_tokens(v, x)}


def _served(v: Values, x: Inputs) -> Inputs:
    return {"N": served_parameters(v, x), "D": served_tokens(v, x)}


LOSS = Quantity("loss", "nats per token", ("N", "D"), loss)
SHARE = Quantity(
    "compute_share",
    "C_best/C",
    ("N", "D"),
    compute_share,
    "part of 6 N D that the best N and D need for this loss",
    dimensionless=True,
)
OPTIMUM = (
    Quantity(
        "optimal_parameters", "parameters", ("C",), optimal_parameters, "N of the least loss for C = 6 N D", derives=_optimum
    ),
    Quantity("optimal_tokens", "tokens", ("C",), optimal_tokens, "D that goes with it", derives=_optimum),
    Quantity(
        "tokens_per_parameter",
        "D/N",
        ("C",),
        lambda v, x: optimal_tokens(v, x) / optimal_parameters(v, x),
        dimensionless=True,
        derives=_optimum,
    ),
    Quantity("optimal_loss", "nats per token", ("C",), optimal_loss, "the loss there", derives=_optimum),
)
SERVED = (
    Quantity(
        "served_parameters",
        "parameters",
        ("C", "I"),
        served_parameters,
        "cheapest N to train and serve at that loss",
        derives=_served,
    ),
    Quantity("served_tokens", "tokens", ("C", "I"), served_tokens, "D that goes with it", derives=_served),
    Quantity(
        "served_saving",
        "share",
        ("C", "I"),
        served_saving,
        "of the FLOPs of training and serving",
        dimensionless=True,
        derives=_served,
    ),
)
