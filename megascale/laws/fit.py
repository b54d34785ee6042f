"""Fits of a form to runs: Huber loss on the logarithm of the loss, variable projection, many starts.

The search runs over the parameters that are not linear; for each trial the linear ones are solved for (Golub and Pereyra 1973). That
leaves two to eight dimensions instead of five to eleven and, for E + A/N^alpha + B/D^beta, a condition number many orders lower
(arXiv 2603.22339). The best starts are then polished in all parameters on the Huber loss itself (arXiv 2203.15556, appendix D.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from megascale.laws.form import Array, Form, Inputs, Values
from megascale.laws.refusals import NoOptimum, NotVaried, TooFewRuns
from megascale.laws.table import RunTable

_POLISHED = 3
"""starts that are polished: the best ones; more do not change any of the reproduced fits"""
_LOST = 1e3
"""residual of a trial whose prediction is not finite"""


@dataclass(frozen=True)
class FitOptions:
    """How a fit is done."""

    delta: float | None = None
    """where the Huber loss turns from square to linear, in natural log of loss; none = 1.345 robust standard deviations of the residuals"""
    starts: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """A form with the parameters that fit some runs."""

    form: Form
    values: dict[str, float]
    delta: float
    residuals: Array
    """natural log of predicted over measured loss, by run"""
    r_squared: float
    """on the loss, not its logarithm"""
    starts_at_optimum: int
    """of those tried, the starts that led to the same optimum"""

    @property
    def rmsle(self) -> float:
        """Root mean square of the log residuals: about the relative error."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def predict(self, inputs: Inputs) -> Array:
        """The loss at some inputs."""
        return self.form.evaluate(self.values, inputs)


def fit(form: Form, table: RunTable, options: FitOptions | None = None) -> Fit:
    """Fit a form to a table of runs.

    Raises:
        TooFewRuns: not more different settings than parameters.
        NotVaried: an input has one value only.
        NoOptimum: no start led anywhere finite.
    """
    options = options or FitOptions()
    check_design(form, table)
    inputs, loss = table.inputs(form.inputs), table.loss
    rng = np.random.default_rng(options.seed)
    starts = [_draw(form, loss, rng) for _ in range(options.starts if form.parameters else 1)]
    found = [trial for trial in (_search(form, start, inputs, loss) for start in starts) if trial is not None]
    if not found:
        raise NoOptimum(
            table.place, f"none of {len(starts)} starts of {form.name} gave a finite fit", "check the units of the inputs"
        )
    found.sort(key=lambda trial: trial[0])
    delta = options.delta if options.delta is not None else _robust_delta(form, found[0][1], inputs, loss)
    polished = [_polish(form, values, inputs, loss, delta) for _, values in found[:_POLISHED]]
    values = min(polished, key=lambda trial: trial[0])[1]
    reached = sum(cost <= found[0][0] * (1 + 1e-3) + 1e-15 for cost, _ in found)
    return finished(form, values, inputs, loss, delta, reached)


def refit(form: Form, near: Values, inputs: Inputs, loss: Array, delta: float) -> Fit | None:
    """The fit of a changed set of runs, started at a fit of nearly the same runs. None when it leads nowhere finite."""
    start = internal(form, near)[: len(form.parameters)]
    found = _search(form, start, inputs, loss)
    if found is None:
        return None
    return finished(form, _polish(form, found[1], inputs, loss, delta)[1], inputs, loss, delta, 1)


def finished(form: Form, values: Values, inputs: Inputs, loss: Array, delta: float, reached: int) -> Fit:
    """A fit with its residuals."""
    predicted = form.evaluate(values, inputs)
    spread = float(np.sum((loss - loss.mean()) ** 2))
    r_squared = 1 - float(np.sum((loss - predicted) ** 2)) / spread if spread > 0 else float("nan")
    return Fit(form, {name: float(value) for name, value in values.items()}, delta, np.log(predicted / loss), r_squared, reached)


def check_design(form: Form, table: RunTable) -> None:
    """Refuse tables that cannot determine the parameters, before any search. Raises TooFewRuns, NotVaried."""
    inputs = table.inputs(form.inputs)
    for symbol in form.inputs:
        if len(np.unique(inputs[symbol])) < 2:
            reason = (
                f"all {len(table)} runs have {symbol} = {inputs[symbol][0]:.6g}, so {form.name} cannot learn what {symbol} does"
            )
            raise NotVaried(table.place, reason, f"add runs with another {symbol}, or fit a form without it")
    cells = len(np.unique(np.stack([inputs[symbol] for symbol in form.inputs]), axis=1).T)
    if cells < len(form.names) + 1:
        reason = f"{len(table)} runs with {cells} different settings; {form.name} has {len(form.names)} parameters"
        raise TooFewRuns(
            table.place, reason, f"give at least {len(form.names) + 1} different settings of {', '.join(form.inputs)}"
        )


def log_residuals(form: Form, x: Array, inputs: Inputs, loss: Array) -> Array:
    """Natural log of predicted over measured loss, for parameters in search coordinates (logarithms where positive)."""
    with np.errstate(all="ignore"):
        residual = np.log(form.evaluate(_external(form, x), inputs) / loss)
    return np.where(np.isfinite(residual), residual, _LOST)


def _draw(form: Form, loss: Array, rng: np.random.Generator) -> Array:
    unit = [loss.min() if p.below_loss else 1.0 for p in form.parameters]
    low = np.array([np.log(p.low * u) if p.positive else p.low for p, u in zip(form.parameters, unit, strict=True)])
    high = np.array([np.log(p.high * u) if p.positive else p.high for p, u in zip(form.parameters, unit, strict=True)])
    return low + (high - low) * rng.random(len(form.parameters))


def _search(form: Form, start: Array, inputs: Inputs, loss: Array) -> tuple[float, dict[str, float]] | None:
    """Least squares over the parameters that are not linear: cost and all parameters."""
    if not form.parameters:
        values, residual = _project(form, {}, inputs, loss)
        return (float(residual @ residual), values) if np.all(np.isfinite(residual)) else None

    def residuals(x: Array) -> Array:
        return _project(form, _named(form, x), inputs, loss)[1]

    low, high = _bounds(form, len(form.parameters), loss)
    inside = np.clip(start, low + 1e-9, high - 1e-9)
    if np.all(residuals(inside) == _LOST):
        return None
    solution = least_squares(residuals, inside, bounds=(low, high), x_scale="jac", max_nfev=200)
    values, residual = _project(form, _named(form, solution.x), inputs, loss)
    return float(residual @ residual), values


def _project(form: Form, values: Mapping[str, float], inputs: Inputs, loss: Array) -> tuple[dict[str, float], Array]:
    """All parameters given those that are not linear, and the residuals: relative errors, near the log residuals."""
    with np.errstate(all="ignore"):
        if form.basis is None:
            residual = np.log(form.evaluate(values, inputs) / loss)
            return dict(values), np.where(np.isfinite(residual), residual, _LOST)
        columns = form.basis(values, inputs)
        if form.linear_in == "loss":
            weight, target = 1 / loss, loss
        else:
            rest = loss if form.offset is None else np.maximum(loss - form.offset(values, inputs), 1e-6 * loss)
            weight, target = rest / loss, np.log(rest)
    weighted = columns * weight[:, None]
    if not np.all(np.isfinite(weighted)):
        return dict(values), np.full_like(loss, _LOST)
    scale = np.maximum(np.linalg.norm(weighted, axis=0), 1e-300)
    if all(linear.positive for linear in form.linear):
        coefficients = nnls(weighted / scale, target * weight)[0]
        coefficients = np.maximum(coefficients, 1e-9)  # zero has no logarithm
    else:
        coefficients = np.linalg.lstsq(weighted / scale, target * weight, rcond=None)[0]
    complete = dict(values)
    with np.errstate(over="ignore"):
        for linear, coefficient in zip(form.linear, coefficients / scale, strict=True):
            complete[linear.name] = coefficient if linear.of is None else linear.of(coefficient, complete)
    return complete, (weighted / scale) @ coefficients - target * weight


def _polish(form: Form, values: Values, inputs: Inputs, loss: Array, delta: float) -> tuple[float, dict[str, float]]:
    """The Huber optimum in all parameters near some values: cost and parameters."""
    low, high = _bounds(form, len(form.names), loss)
    start = np.clip(internal(form, values), low + 1e-9, high - 1e-9)
    solution = least_squares(
        lambda x: log_residuals(form, x, inputs, loss), start, bounds=(low, high), loss="huber", f_scale=delta,
        x_scale="jac", ftol=1e-13, xtol=1e-12, gtol=1e-14, max_nfev=400,
    )  # fmt: skip
    return float(solution.cost), _external(form, solution.x)


def _robust_delta(form: Form, values: Values, inputs: Inputs, loss: Array) -> float:
    """1.345 standard deviations (Huber 1981: 95 % efficient for normal errors), from the median absolute residual."""
    residual = np.log(form.evaluate(values, inputs) / loss)
    return max(1.345 * 1.4826 * float(np.median(np.abs(residual))), 1e-6)


def _bounds(form: Form, count: int, loss: Array) -> tuple[Array, Array]:
    low, high = np.full(count, -np.inf), np.full(count, np.inf)
    for i, parameter in enumerate(form.parameters):
        ends = np.array([parameter.least, loss.min() * (1 - 1e-6) if parameter.below_loss else parameter.most])
        if parameter.positive:
            ends = np.log(np.maximum(ends, 1e-300))
        low[i], high[i] = ends
    return low, high


def _named(form: Form, x: Array) -> dict[str, float]:
    """The parameters that are not linear, by name."""
    return _values(tuple(p.name for p in form.parameters), tuple(p.positive for p in form.parameters), x)


def internal(form: Form, values: Values) -> Array:
    """Parameters in search coordinates: logarithms where positive."""
    pairs = zip(form.names, form.positive, strict=True)
    return np.array([np.log(values[name]) if positive else values[name] for name, positive in pairs])


def _external(form: Form, x: Array) -> dict[str, float]:
    return _values(form.names, form.positive, x)


def _values(names: tuple[str, ...], positive: tuple[bool, ...], x: Array) -> dict[str, float]:
    # Numbers stay numpy's: a search may try values that overflow, which Python's floats refuse; the residual is then _LOST.
    with np.errstate(over="ignore"):
        return {name: np.exp(value) if log else np.float64(value) for name, log, value in zip(names, positive, x, strict=True)}
