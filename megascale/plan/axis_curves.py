"""What the pictures of the search over axes show: the best loss against training FLOPs, and at one budget against N and D, law by law.

Every number is that of the search at its budget (`megascale.plan.axis_search.compare`). Losses of different laws are not compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.config.errors import InputError
from megascale.plan.axis_candidates import Table, dense_table
from megascale.plan.axis_search import AxisSearch, Judged, compare, dense_curve, why_left_out
from megascale.plan.hypothesis import Sizes, out_of_range

BUDGETS = np.logspace(-1.5, 1.5, 13)
"""training FLOPs at which the best design is looked for, over the budget"""
INTERVALS = 8
"""of N or D in a factor of ten"""
GROUPS = ("dense", "experts", "streams", "streams and experts")


def axis_curves(found: AxisSearch, draws: int = 100) -> dict[str, Any]:
    """Curves of every law in plain values.

    Args:
        draws: as given to the search.

    Returns:
        flops: the budget. left_out: budgets that train nothing within the limits, with the reason. laws: law -> its interval,
        `best`: the design of least loss at each budget, `dense`: budgets and the loss of the best dense shape without limits, and
        `profiles`: N or D -> group of designs -> at the budget the design of least loss in each interval of N or D, ascending.
    """
    left_out: list[dict[str, Any]] = []
    best: dict[str, list[dict[str, Any]]] = {one.base.name: [] for one in found.judged}
    for budget in found.flops * BUDGETS:
        try:
            table, tokens, judged = compare(budget, found.device, found.limits, found.axes, found.work, found.own, draws)
        except InputError as error:
            left_out.append({"flops": float(budget), "reason": error.reason})
            continue
        fits = np.flatnonzero(why_left_out(table, tokens, found.limits) == "fits")
        if not len(fits):
            left_out.append({"flops": float(budget), "reason": "no design keeps the limits"})
            continue
        for one in judged:
            index = int(fits[np.argmin(one.loss[fits])])
            best[one.base.name].append({"flops": float(budget), **_point(found, table, tokens, one, index)})
    dense = dense_table(found.work, found.device)
    laws: dict[str, Any] = {}
    for one in found.judged:
        budgets, losses = dense_curve(one.base, dense, found.flops)
        shown = (budgets >= found.flops * BUDGETS[0]) & (budgets <= found.flops * BUDGETS[-1])
        laws[one.base.name] = {
            "interval": one.base.interval,
            "best": best[one.base.name],
            "dense": {"flops": budgets[shown].tolist(), "loss": losses[shown].tolist()},
            "profiles": {
                symbol: {group: _profile(found, one, mask, symbol) for group, mask in group_masks(found.table.sizes).items()}
                for symbol in ("N", "D")
            },
        }
    return {"flops": found.flops, "left_out": left_out, "laws": laws}


def group_masks(sizes: Sizes) -> dict[str, NDArray[np.bool_]]:
    """Which designs have neither streams nor experts, one of them, or both."""
    streams, experts = sizes.streams > 1, sizes.experts > 1
    return dict(zip(GROUPS, (~streams & ~experts, ~streams & experts, streams & ~experts, streams & experts), strict=True))


def _profile(found: AxisSearch, one: Judged, mask: NDArray[np.bool_], symbol: str) -> list[dict[str, Any]]:
    """In each interval of N or D the design of least loss that keeps the limits."""
    values = found.table.sizes.parameters if symbol == "N" else found.tokens
    best: dict[int, int] = {}
    for index in np.flatnonzero(mask & found.fits):
        interval = int(np.floor(np.log10(values[index]) * INTERVALS))
        if interval not in best or one.loss[index] < one.loss[best[interval]]:
            best[interval] = int(index)
    chosen = sorted(best.values(), key=lambda index: float(values[index]))
    return [_point(found, found.table, found.tokens, one, index) for index in chosen]


def _point(found: AxisSearch, table: Table, tokens: NDArray[np.float64], one: Judged, index: int) -> dict[str, Any]:
    """A design as one law has it."""
    ratio, trained, sizes = float(one.ratio.middle[index]), float(tokens[index]), table.sizes.at(index)
    return {
        "name": table.models[index].name,
        "N": table.models[index].active,
        "D": trained,
        "loss": float(one.loss[index]),
        "low": float(one.low[index]),
        "high": float(one.high[index]),
        "compute_multiplier": float(one.multiplier[index]),
        "out_of_range": out_of_range(sizes, one.base, ratio, trained, found.limits.unique) | found.own.outside(sizes),
    }
