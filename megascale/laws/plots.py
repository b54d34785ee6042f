"""Pictures of laws: the loss against one input, a line for each setting of the others; runs as points, with 95 % bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megascale.config.errors import InputError
from megascale.laws.form import Array, meaningful_span
from megascale.laws.law import Law
from megascale.laws.predict import grid
from megascale.laws.study import Study
from megascale.observe.figures import curve, panels, save

_POINTS = 200
_MOST_LINES = 12


def plot_law(law: Law, x: str, at: Mapping[str, Sequence[float]], path: Path) -> None:
    """The first quantity of a law that needs most of the inputs, against x over its range and a factor of three beyond, dashed there.

    Raises:
        InputError: no range of x, an input missing or without effect, more lines than can be told apart.
    """
    _check_symbols(law, x, at)
    determined = [q for q in law.quantities if x in q.inputs and set(q.inputs) <= {x, *at}]
    quantity = max(determined, key=lambda q: len(q.inputs), default=None)
    if quantity is None:
        needs = "; ".join(f"{q.name}: {', '.join(q.inputs)}" for q in law.quantities if x in q.inputs)
        raise InputError(f"--x {x}", f"law {law.name} needs more than {', '.join([x, *at])}", f"give the rest with --at. {needs}")
    if unused := [symbol for symbol in at if symbol not in quantity.inputs]:
        raise InputError(f"--at {unused[0]}", f"has no effect on {quantity.name} of {law.name}, which is drawn", "leave it out")
    low, high = law.variables[x].low, law.variables[x].high
    if not (low > 0 and np.isfinite(high)):
        raise InputError(f"--x {x}", f"law {law.name} states no range of {x}", "choose another input for the axis")
    others = {symbol: at[symbol] for symbol in quantity.inputs if symbol != x}
    values = np.geomspace(*meaningful_span(x, low / 3, high * 3), _POINTS)
    axes = _axes(law.title, f"{x}: {law.variables[x].meaning} ({law.variables[x].unit})", f"{quantity.name} ({quantity.unit})")
    for label, fixed in _lines(others):
        inputs = {x: values, **{symbol: np.full(_POINTS, value) for symbol, value in fixed.items()}}
        outside = np.zeros(_POINTS, dtype=bool)
        for flags in law.outside(inputs, quantity).values():
            outside |= flags
        curve(axes, values, law.predict(quantity.name, inputs), outside, label)
    _save(axes, path)


def _check_symbols(law: Law, x: str, at: Mapping[str, Sequence[float]]) -> None:
    for option, symbol in [("--x", x), *(("--at", symbol) for symbol in at)]:
        if symbol not in law.given:
            raise InputError(f"{option} {symbol}", f"is no input of {law.name}", f"choose among {', '.join(law.given)}")
    if x in at:
        raise InputError(f"--at {x}", "is the axis of the plot, which has a range of its own", "leave it out")


def plot_study(found: Study, x: str, path: Path) -> None:
    """The runs of a fit, and its curve with a 95 % band for each setting of the other inputs that the runs have.

    Raises:
        InputError: x is no input of the form, or there are more lines than can be told apart.
    """
    form, table = found.fit.form, found.table
    if x not in form.inputs:
        raise InputError(f"--x {x}", f"is no input of {form.name}", f"choose among {', '.join(form.inputs)}")
    values = np.geomspace(*meaningful_span(x, table.columns[x].min() / 2, table.columns[x].max() * 2), _POINTS)
    outside = (values < table.columns[x].min()) | (values > table.columns[x].max())
    axes = _axes(f"{form.formula}, {len(table)} runs", x, "loss")
    others = [symbol for symbol in form.inputs if symbol != x]
    groups = _groups(np.stack([table.columns[symbol] for symbol in others], axis=1) if others else np.zeros((len(table), 1)))
    for rows in groups:
        fixed = {symbol: float(np.exp(np.log(table.columns[symbol][rows]).mean())) for symbol in others}
        inputs = {x: values, **{symbol: np.full(_POINTS, value) for symbol, value in fixed.items()}}
        label = ", ".join(f"{symbol} = {value:.4g}" for symbol, value in fixed.items())
        colour = curve(axes, values, found.fit.predict(inputs), outside, label)
        axes.plot(table.columns[x][rows], table.loss[rows], "o", color=colour, markersize=4)
        if found.draws.values:
            axes.fill_between(values, *found.draws.predictions(inputs), color=colour, alpha=0.15, linewidth=0)
    _save(axes, path)


def _groups(settings: Array) -> list[NDArray[np.intp]]:
    """Rows whose settings differ by less than 10 %: the sizes of one nominal model differ a little with its streams or experts."""
    keys = [tuple(row) for row in np.round(np.log(np.maximum(settings, 1e-300)) / np.log(1.1)).astype(int)]
    _check_count(len(set(keys)))
    return [np.flatnonzero([key == chosen for key in keys]) for chosen in sorted(set(keys))]


def _lines(others: Mapping[str, Sequence[float]]) -> list[tuple[str, dict[str, float]]]:
    combinations = grid(others)
    _check_count(len(combinations))
    return [(", ".join(f"{symbol} = {value:.4g}" for symbol, value in fixed.items()), fixed) for fixed in combinations]


def _check_count(lines: int) -> None:
    if lines > _MOST_LINES:
        raise InputError(
            "the plot", f"would have {lines} lines, more than {_MOST_LINES}", "put the input with most values on the axis: --x"
        )


def _axes(title: str, x_label: str, y_label: str) -> Axes:
    axes = panels(1, 1, 7, 4.5)[0][0]
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log")
    return axes


def _save(axes: Axes, path: Path) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", title="dashed: out of range")
    save(axes, path)
