"""Routers side by side: the routed law of each, its effective parameter counts, and the order of the losses cell by cell.

The dense runs (E = 1) belong to every router: there all are the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from megascale.laws.families.effective_parameters import cutoff, effective_parameters
from megascale.laws.fit import FitOptions
from megascale.laws.refusals import BadTable
from megascale.laws.study import Study, study
from megascale.laws.table import RunTable


def compare_routers(
    table: RunTable, points: Sequence[tuple[float, float]], options: FitOptions | None = None, draws: int = 200
) -> dict[str, Any]:
    """Fit equation 1 of arXiv 2202.01169 to each router's runs.

    Args:
        table: columns N, E, loss and the label `router`; rows with E = 1 count for all.
        points: (N, E) at which effective parameters and losses are compared.

    Returns:
        `routers`: by router the coefficients, N_cutoff and effective parameters with 95 % intervals, and the errors; `cells`: the
        measured losses of each (N, E) that several routers have, best first; `best`: how many cells each wins; `predicted`: the same
        order at the points, with the share of draws in which the first has the lowest loss.

    Raises:
        BadTable: no labels, or fewer than two routers.
        FitRefused: the runs of a router cannot carry the law.
    """
    options = options or FitOptions()
    experts = table.inputs(("N", "E"))["E"]
    if "router" not in table.labels:
        raise BadTable(table.place, "has no column of routers", "name it: --map router=COLUMN")
    label = np.array(table.labels["router"])
    names = sorted(set(label[experts > 1].tolist()))
    if len(names) < 2:
        raise BadTable(table.place, f"has runs of {', '.join(names) or 'no router'}", "give runs of two routers or more")
    studies = {name: study("routed", table.rows((label == name) | (experts == 1)), options, draws) for name in names}
    cells = _cells(table, label)
    return {
        "routers": {name: _router(found, points) for name, found in studies.items()},
        "cells": cells,
        "best": dict(Counter(cell["order"][0] for cell in cells).most_common()),
        "predicted": [_predicted(studies, n, e) for n, e in points],
    }


def _router(found: Study, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    low, high = found.draws.interval(cutoff) if found.draws.values else (None, None)
    counts = []
    for n, e in points:
        x = {"N": np.asarray(float(n)), "E": np.asarray(float(e))}
        ends = found.draws.interval(partial(effective_parameters, x=x)) if found.draws.values else (None, None)
        counts.append({
            "N": n, "E": e, "effective_parameters": float(effective_parameters(found.fit.values, x)),
            "low": _float(ends[0]), "high": _float(ends[1]), "out_of_range": sorted(found.outside(x)),
        })  # fmt: skip
    facts = found.facts()
    kept = ("runs", "parameters", "rmsle", "leave_one_out_rmsle", "largest_size", "condition", "weak", "bootstrap")
    return {
        **{name: facts[name] for name in kept},
        "cutoff": {"value": cutoff(found.fit.values), "low": _float(low), "high": _float(high)},
        "effective_parameters": counts,
    }


def _cells(table: RunTable, label: np.ndarray) -> list[dict[str, Any]]:
    """Measured losses by (N, E), the mean where a router has several runs; cells of two routers and more."""
    found: dict[tuple[float, float], dict[str, list[float]]] = {}
    for n, e, name, loss in zip(table.columns["N"], table.columns["E"], label, table.loss, strict=True):
        if e > 1:
            found.setdefault((float(n), float(e)), {}).setdefault(str(name), []).append(float(loss))
    cells = []
    for (n, e), losses in sorted(found.items()):
        if len(losses) > 1:
            means = {name: float(np.mean(values)) for name, values in losses.items()}
            cells.append({"N": n, "E": e, "losses": means, "order": sorted(means, key=means.__getitem__)})
    return cells


def _predicted(studies: dict[str, Study], n: float, e: float) -> dict[str, Any]:
    x = {"N": np.asarray([float(n)]), "E": np.asarray([float(e)])}
    losses = {name: float(found.fit.predict(x)[0]) for name, found in studies.items()}
    order = sorted(losses, key=losses.__getitem__)
    drawn = {name: [float(found.draws.form.evaluate(v, x)[0]) for v in found.draws.values] for name, found in studies.items()}
    count = min(len(values) for values in drawn.values())
    best = [all(drawn[order[0]][i] <= drawn[other][i] for other in order[1:]) for i in range(count)]
    return {"N": n, "E": e, "losses": losses, "order": order, "first_is_best_share": float(np.mean(best)) if best else None}


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
