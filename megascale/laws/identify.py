"""Which parameters a design can tell apart: the singular values of the Jacobian at the optimum.

Columns are derivatives of log predicted loss by each parameter (its logarithm where positive), scaled to length one, so that the
condition number does not depend on units. A singular value near zero names a direction in which the fit hardly changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megascale.laws.fit import Fit, internal, log_residuals
from megascale.laws.form import Array, Inputs
from megascale.laws.refusals import NotSeparable

_LOST = 1e-7
"""singular value, relative to the largest, below which a direction is not determined at all (the derivatives are good to about 1e-9)"""
_WEAK = 1e-2
"""below this a direction is reported as weak"""
_SHARE = 0.2
"""weight that a parameter must have in a direction to be named"""
_EMPTY = 1e-9
"""change of log loss per unit below which a positive parameter has left the fit: its term is zero"""


@dataclass(frozen=True)
class Identifiability:
    """How well the runs determine the parameters."""

    condition: float
    """largest over smallest singular value"""
    weak: tuple[tuple[str, ...], ...]
    """groups of parameters that can move together with little effect, worst first"""
    at_zero: tuple[str, ...]
    """positive parameters whose term the fit has driven to zero"""


def identifiability(fit: Fit, inputs: Inputs, place: str) -> Identifiability:
    """Judge a fit.

    Raises:
        NotSeparable: some parameters have the same effect on all runs, or none.
    """
    jacobian = _jacobian(fit, inputs)
    lengths = np.linalg.norm(jacobian, axis=0) / np.sqrt(len(jacobian))
    scales = [linear.name for linear in fit.form.linear if linear.positive]
    at_zero = tuple(name for name, length in zip(fit.form.names, lengths, strict=True) if length < _EMPTY and name in scales)
    kept = [i for i, name in enumerate(fit.form.names) if name not in at_zero]
    names = [fit.form.names[i] for i in kept]
    without = [name for name, i in zip(names, kept, strict=True) if lengths[i] < _EMPTY]
    if without:
        reason = f"{', '.join(without)} of {fit.form.name} has no effect at the optimum" + (
            f", where {at_zero[0]} is zero" if at_zero else ""
        )
        raise NotSeparable(place, reason, "fit a form without it, or add runs in which it matters")
    _, values, directions = np.linalg.svd(jacobian[:, kept] / np.linalg.norm(jacobian[:, kept], axis=0), full_matrices=False)
    groups = [
        (value / values[0], tuple(name for name, weight in zip(names, direction, strict=True) if abs(weight) >= _SHARE))
        for value, direction in zip(values[::-1], directions[::-1], strict=True)
    ]
    lost = [group for ratio, group in groups if ratio < _LOST]
    if lost:
        reason = (
            f"these runs cannot separate {' from '.join(lost[0])} of {fit.form.name}: a change of one is undone by the others"
        )
        raise NotSeparable(place, reason, f"vary {', '.join(fit.form.inputs)} independently of each other, or fit a simpler form")
    weak = tuple(group for ratio, group in groups if ratio < _WEAK)
    return Identifiability(float(values[0] / values[-1]), weak, at_zero)


def _jacobian(fit: Fit, inputs: Inputs) -> Array:
    """Derivatives of log predicted loss, by central differences."""
    loss = np.ones(len(fit.residuals))
    x = internal(fit.form, fit.values)
    step = 1e-6 * np.maximum(np.abs(x), 1)
    columns = []
    for i, width in enumerate(step):
        up, down = x.copy(), x.copy()
        up[i] += width
        down[i] -= width
        columns.append((log_residuals(fit.form, up, inputs, loss) - log_residuals(fit.form, down, inputs, loss)) / (2 * width))
    return np.stack(columns, axis=1)
