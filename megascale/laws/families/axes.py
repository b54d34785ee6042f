"""Forms for runs of one's own, of what has no published law: AltUp's blocks (arXiv 2301.13310), and all axes in one.

N parameters that one token passes, D training tokens, P streams, E experts (1 = dense), K blocks. Both are hypotheses: the worth of an
axis does not change with N or D, and several axes multiply. `laws compare` says whether runs agree.
"""

from __future__ import annotations

import numpy as np

from megascale.laws.families.parscale import FLOOR, SCALE, multiplier
from megascale.laws.form import Array, Form, Inputs, Linear, Parameter, Values

_ALPHA = Parameter("alpha", 0.05, 1.0, least=1e-3, most=5.0)
_BLOCKS = Parameter("b", -0.2, 0.4, positive=False, least=-3.0, most=3.0)


def blocks_worth(v: Values, blocks: Array) -> Array:
    """a_K = K^b: by how much K blocks multiply N."""
    return np.asarray(blocks, dtype=np.float64) ** v["b"]


def _of_blocks(v: Values, x: Inputs) -> Array:
    return x["N"] * blocks_worth(v, x["K"])


BLOCKS = Form(
    "blocks", "L = E + (A / (N K^b))^alpha", ("N", "K"), (_BLOCKS, _ALPHA), (FLOOR, SCALE),
    lambda v, x: v["E"] + (v["A"] / _of_blocks(v, x)) ** v["alpha"],
    lambda v, x: np.stack([np.ones_like(x["N"]), _of_blocks(v, x) ** -v["alpha"]], axis=1),
)  # fmt: skip
"""At one D: what parscale is for streams, but with an exponent, because blocks may also harm."""


def _effective(v: Values, x: Inputs) -> Array:
    return _of_blocks(v, x) * multiplier(v, x) * x["E"] ** v["m"]


AXES = Form(
    "axes", "L = L0 + A/(N (k ln P + 1) E^m K^b)^alpha + B/D^beta", ("N", "D", "P", "E", "K"),
    (
        Parameter("k", 0.05, 2.0), Parameter("m", 0.0, 0.6, positive=False, least=-3.0, most=3.0), _BLOCKS, _ALPHA,
        Parameter("beta", 0.1, 1.0, least=1e-3, most=5.0),
    ),
    (Linear("L0"), Linear("A"), Linear("B")),
    lambda v, x: v["L0"] + v["A"] * _effective(v, x) ** -v["alpha"] + v["B"] * x["D"] ** -v["beta"],
    lambda v, x: np.stack([np.ones_like(x["N"]), _effective(v, x) ** -v["alpha"], x["D"] ** -v["beta"]], axis=1),
)  # fmt: skip
"""The hypothesis of the search over axes (`megascale.plan.hypothesis`), with E^m for its Nbar(N,E)/N."""

FORMS = (BLOCKS, AXES)
