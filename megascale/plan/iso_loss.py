"""Designs of one loss along each axis: which N goes with how many streams, experts or tokens, and what training FLOPs each takes.

For a law, the reference is the best dense shape of the budget on the tokens that there are: N*, D*, and its loss. Along P and E the tokens
stay D*; along D the model is dense. Shapes keep the reference's layers a step of width, and their parameters, FLOPs and memory are exact
counts; between two of them the logarithms of the counts are interpolated. The ends are the least and the largest product of the factors
(`megascale.plan.hypothesis.effective`); along D those of the law's refits, where it has some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.laws.form import Array, Values
from megascale.plan.axis_candidates import DENSE, LEAST_RATIO, Table, dense_table, shape_candidate, table_of
from megascale.plan.axis_search import AxisSearch, effective_ratios
from megascale.plan.hypothesis import Base, Effective, out_of_range
from megascale.plan.shapes import LARGEST, shapes

TIMES_N = (0.25, 0.5, 1.0, 2.0, 4.0)
"""parameters of the dense models whose losses are shown, over the reference's"""
TIMES_D = np.logspace(-0.6, 1.2, 13)
"""tokens along the axis D, over the reference's; the reference's own are in it too"""
_POINTS = 4000
_TAIL = 2.5


@dataclass(frozen=True)
class _Family:
    """Shapes of ascending width with the same axes."""

    axes: tuple[int, int, int, int]
    table: Table
    ratios: dict[str, Effective]

    def fine(self, values: Array) -> Array:
        """A column at many N, interpolated in logarithms."""
        n = np.log(self.table.sizes.parameters)
        return np.exp(np.interp(np.log(self.parameters), n, np.log(values)))

    @property
    def parameters(self) -> Array:
        """Many N from the smallest shape to the largest."""
        n = self.table.sizes.parameters
        return np.geomspace(n[0], n[-1], _POINTS)


_Families = dict[tuple[int, tuple[int, int, int, int]], _Family]


def iso_loss(found: AxisSearch, draws: int = 100) -> dict[str, Any]:
    """Law -> the reference and, along each axis that was searched, the models of its loss, in plain values.

    Args:
        draws: as given to the search.
    """
    families: _Families = {}
    return {one.base.name: _of_law(found, one.base, draws, families) for one in found.judged}


def _of_law(found: AxisSearch, base: Base, draws: int, families: _Families) -> dict[str, Any]:
    dense = dense_table(found.work, found.device)
    tokens = found.flops / dense.train
    losses = base.loss(dense.sizes.parameters, tokens, np.ones(len(dense)), found.limits.unique)
    index = int(np.argmin(np.where(tokens >= LEAST_RATIO * dense.sizes.parameters, losses, np.inf)))
    depth = list(shapes())[index][1]
    n, d = float(dense.sizes.parameters[index]), float(tokens[index])
    levels = [float(_dense_loss(base, n * times, d, found.limits.unique)) for times in TIMES_N]

    def family(axes: tuple[int, int, int, int]) -> _Family:
        if (depth, axes) not in families:
            share = found.axes.stream_share
            table = table_of(
                [shape_candidate(step, depth, axes, found.work, found.device, share) for step in range(1, LARGEST + 1)]
            )
            families[depth, axes] = _Family(axes, table, effective_ratios(table.sizes, found.own, draws))
        return families[depth, axes]

    axes: dict[str, list[dict[str, Any]]] = {}
    if max(found.axes.streams) > 1:
        values = sorted({1, *found.axes.streams})
        axes["P"] = [_row(found, base, family((value, 1, 1, 1)), d, levels, value) for value in values]
    k = min(found.axes.per_token)
    routed = sorted(value for value in set(found.axes.experts) if value > k)
    if routed:
        rows = [_row(found, base, family((1, value, k, 1)), d, levels, value) for value in routed]
        axes["E"] = [_row(found, base, family(DENSE), d, levels, 1), *rows]
    trained = sorted({*(d * TIMES_D).tolist(), d})
    axes["D"] = [_row(found, base, family(DENSE), value, levels, value) for value in trained]
    for row in axes["D"] if base.draws else ():
        row.update(_refitted(found, base, family(DENSE), n, d, row["D"]))
    reference = {"name": dense.models[index].name, "N": n, "D": d, "flops": found.flops, "loss": float(losses[index])}
    return {
        "reference": reference,
        "interval": base.interval,
        "levels": levels,
        "axes": axes,
        "k": k,
        "memory_limit": found.limits.memory,
    }


def _dense_loss(base: Base, n: Array | float, d: Array | float, unique: float, values: Values | None = None) -> Array:
    return base.loss(np.asarray(n), np.asarray(d), np.ones(()), unique, values)


def _row(found: AxisSearch, base: Base, family: _Family, d: float, levels: list[float], value: float) -> dict[str, Any]:
    """The models with some axes and tokens that have the levels' losses; FLOPs and memory are those of the reference's loss."""
    ratio, sizes = family.ratios[base.name], family.table.sizes
    target = levels[TIMES_N.index(1.0)]
    unique = found.limits.unique
    least, middle, most = (_needed(base, family, one, d, unique, target) for one in (ratio.high, ratio.middle, ratio.low))
    outside: dict[str, list[str]] = {}
    if 0 < middle < np.inf:
        near = int(np.argmin(np.abs(np.log(sizes.parameters / middle))))
        outside = out_of_range(sizes.at(near), base, float(ratio.middle[near]), d, unique)
    return {
        "value": value,
        "D": d,
        **_ends(family, d, least, middle, most),
        "memory_bytes": _at(family, middle, family.table.memory),
        "N_at_levels": [_known(_needed(base, family, ratio.middle, d, unique, level)) for level in levels],
        "out_of_range": outside,
    }


def _refitted(found: AxisSearch, base: Base, family: _Family, n: float, d: float, tokens: float) -> dict[str, Any]:
    """N and FLOPs along D with ends: each refit's own N for its own loss of the reference, 95 % of them."""
    unit, unique = np.ones(len(family.table)), found.limits.unique

    def needed(values: Values | None) -> float:
        return _needed(base, family, unit, tokens, unique, float(_dense_loss(base, n, d, unique, values)), values)

    refits = np.array([needed(values) for values in base.draws])
    least = float(np.percentile(refits, _TAIL, method="lower"))  # between two refits there may be infinity
    most = float(np.percentile(refits, 100 - _TAIL, method="higher"))
    return _ends(family, tokens, least, needed(None), most)


def _needed(
    base: Base, family: _Family, ratio: Array, d: float, unique: float, loss: float, values: Values | None = None
) -> float:
    """N of a loss; infinity where the largest shape is worse, 0 where the smallest is better."""
    n = family.parameters
    _, experts, per_token, _ = family.axes
    losses = base.loss(n * family.fine(ratio), np.full(_POINTS, d), np.full(_POINTS, experts / per_token), unique, values)
    if not losses[-1] <= loss <= losses[0]:
        return np.inf if loss < losses[-1] else 0.0
    return float(np.exp(np.interp(-loss, -losses, np.log(n))))


def _ends(family: _Family, d: float, least: float, middle: float, most: float) -> dict[str, Any]:
    ends = {"least": least, "middle": middle, "most": most}
    return {
        "N": {end: _known(n) for end, n in ends.items()},
        "flops": {end: _at(family, n, family.table.train, d) for end, n in ends.items()},
    }


def _known(n: float) -> float | None:
    return n if 0 < n < np.inf else None


def _at(family: _Family, n: float, column: Array, times: float = 1.0) -> float | None:
    """A count of the model of N parameters."""
    if _known(n) is None:
        return None
    return float(times * np.exp(np.interp(np.log(n), np.log(family.parameters), np.log(family.fine(column)))))
