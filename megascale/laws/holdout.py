"""Errors on runs that were not fitted: one run left out at a time, and the largest size left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megascale.laws.fit import Fit, FitOptions, fit, refit
from megascale.laws.form import Array
from megascale.laws.refusals import FitRefused
from megascale.laws.table import RunTable


@dataclass(frozen=True)
class SizeHoldout:
    """The runs of the largest size, predicted from the others."""

    symbol: str
    largest: float
    runs: int
    rmsle: float
    bias: float
    """mean of the log residuals: positive predicts too high a loss"""


def leave_one_out(whole: Fit, table: RunTable) -> Array:
    """Log residual of each run under the fit of the others; nan where the others give no fit."""
    inputs, loss = table.inputs(whole.form.inputs), table.loss
    residuals = np.full(len(loss), np.nan)
    for i in range(len(loss)):
        kept = np.arange(len(loss)) != i
        without = refit(
            whole.form, whole.values, {symbol: column[kept] for symbol, column in inputs.items()}, loss[kept], whole.delta
        )
        if without is not None:
            here = {symbol: column[~kept] for symbol, column in inputs.items()}
            residuals[i] = np.log(without.predict(here)[0] / loss[i])
    return residuals


def largest_size(whole: Fit, table: RunTable, options: FitOptions) -> SizeHoldout | str:
    """Fit without the runs of the largest size and predict them; where the rest cannot be fitted, the reason instead."""
    symbol = whole.form.size
    size = table.columns[symbol]
    # Sizes of one nominal model differ a little with its streams or experts.
    held = size > size.max() / 1.1
    try:
        rest = fit(whole.form, table.rows(~held), FitOptions(whole.delta, options.starts, options.seed))
    except FitRefused as error:
        return f"not possible: {error.reason}"
    inputs = table.rows(held).inputs(whole.form.inputs)
    residual = np.log(rest.predict(inputs) / table.loss[held])
    rmsle = float(np.sqrt(np.mean(residual**2)))
    return SizeHoldout(symbol, float(size.max()), int(held.sum()), rmsle, float(residual.mean()))
