"""Bootstrap over runs: refit tables drawn from the runs with replacement, and read intervals off the refits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megascale.laws.fit import Fit, refit
from megascale.laws.form import Array, Form, Inputs, Values
from megascale.laws.table import RunTable

_WILD = 10.0
"""a draw that fits its own runs this many times worse than the fit of all runs has not converged"""


@dataclass(frozen=True)
class Draws:
    """Parameters of the refits."""

    form: Form
    values: tuple[dict[str, float], ...]
    failed: int
    """draws with too few different runs, or without an optimum"""

    def interval(self, of: Callable[[Values], Array | float], level: float = 0.95) -> tuple[Array, Array]:
        """The central interval of a function of the parameters, elementwise."""
        found = np.array([of(values) for values in self.values])
        tail = 100 * (1 - level) / 2
        # "nearest" returns drawn values, infinite ones too, which interpolation would turn into nan.
        low, high = np.percentile(found, [tail, 100 - tail], axis=0, method="nearest")
        return low, high

    def predictions(self, inputs: Inputs, level: float = 0.95) -> tuple[Array, Array]:
        """The interval of the predicted loss. It holds the uncertainty of the parameters, not of the form."""
        return self.interval(lambda values: self.form.evaluate(values, inputs), level)


def bootstrap(fit: Fit, table: RunTable, count: int, seed: int) -> Draws:
    """Refit `count` tables of as many runs, drawn with replacement, each search started at the fit of all runs."""
    rng = np.random.default_rng(seed)
    inputs, loss = table.inputs(fit.form.inputs), table.loss
    values = []
    for _ in range(count):
        chosen = rng.integers(0, len(loss), len(loss))
        if len(np.unique(chosen)) <= len(fit.form.names):
            continue
        drawn = refit(
            fit.form, fit.values, {symbol: column[chosen] for symbol, column in inputs.items()}, loss[chosen], fit.delta
        )
        if drawn is not None and drawn.rmsle <= _WILD * max(fit.rmsle, 1e-9):
            values.append(drawn.values)
    return Draws(fit.form, tuple(values), count - len(values))
