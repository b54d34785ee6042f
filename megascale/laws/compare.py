"""Competing forms on the same runs, judged on runs they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megascale.laws.fit import FitOptions
from megascale.laws.form import Array
from megascale.laws.refusals import FitRefused
from megascale.laws.study import Study, study
from megascale.laws.table import RunTable

_RESAMPLES = 2000


def compare_forms(names: Sequence[str], table: RunTable, options: FitOptions | None = None) -> list[dict[str, Any]]:
    """Fit each form and rank them by the error of runs left out one at a time, best first; refused forms come last.

    `worse_share` is the share of resamples of the runs in which the form predicts left-out runs worse than the best form does:
    near 1 it is worse, near 0.5 these runs cannot decide.

    Raises:
        FitRefused: every form was refused; the error of the first.
    """
    options = options or FitOptions()
    studies: dict[str, Study] = {}
    refused: dict[str, FitRefused] = {}
    for name in names:
        try:
            studies[name] = study(name, table, options, draws=0)
        except FitRefused as error:
            refused[name] = error
    if not studies:
        raise next(iter(refused.values()))
    ranked = sorted(studies.values(), key=lambda found: found.left_out_rmsle)
    rows = [_row(found, _worse_share(found.left_out, ranked[0].left_out, options.seed)) for found in ranked]
    return rows + [{"form": name, "refused": error.reason, "remedy": error.remedy} for name, error in refused.items()]


def _row(found: Study, worse: float) -> dict[str, Any]:
    held = found.size_holdout
    return {
        "form": found.fit.form.name,
        "formula": found.fit.form.formula,
        "parameters": len(found.fit.form.names),
        "rmsle": found.fit.rmsle,
        "leave_one_out_rmsle": found.left_out_rmsle,
        "largest_size": held if isinstance(held, str) else asdict(held),
        "condition": found.identifiability.condition,
        "worse_share": worse,
    }


def _worse_share(residuals: Array, best: Array, seed: int) -> float:
    """Paired bootstrap over runs of the difference of squared log residuals; ties count half."""
    difference = residuals**2 - best**2
    difference = difference[np.isfinite(difference)]
    rng = np.random.default_rng(seed)
    sums = difference[rng.integers(0, len(difference), (_RESAMPLES, len(difference)))].sum(axis=1)
    return float(np.mean(sums > 0) + np.mean(sums == 0) / 2)
