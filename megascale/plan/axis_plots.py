"""The search over axes as pictures: loss against FLOPs, parameters and tokens, and what has one loss along each axis.

A panel for each law, because losses of different laws are not comparable; the only axis that laws share is C/C_dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from megascale.config.errors import InputError
from megascale.observe.figures import figure_of, legend_below, panels, save
from megascale.plan.iso_loss import TIMES_N

Facts = dict[str, Any]
Numbers = NDArray[np.float64]
COLUMNS = 3
RANGE = "hollow: out of the range of the law or of a factor's law"
BAND = "band: what the factors' laws span, and a law's refits where it has some"
AXES = {"P": "streams P", "E": "experts E", "D": "training tokens D"}
_TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_ROOM = 0.35
"""nats above the least loss of a panel that are shown"""


def plot_axes(curves: Facts, iso: Facts, folder: Path) -> list[Path]:
    """Writes all pictures.

    Args:
        curves: of `megascale.plan.axis_curves.axis_curves`.
        iso: of `megascale.plan.iso_loss.iso_loss`.
        folder: made where it does not exist.

    Returns:
        The files.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plot {folder}", f"is no folder that can be written: {error.strerror}", "name another") from error
    files = []
    for name, draw in pictures(curves, iso).items():
        files.append(folder / f"{name}.png")
        save(draw(), files[-1])
    return files


def pictures(curves: Facts, iso: Facts) -> dict[str, Callable[[], Axes]]:
    """Name -> what draws it; the result is a panel of the figure."""
    return {
        "loss_flops": partial(_loss_flops, curves),
        "loss_parameters": partial(_loss_profile, curves, "N", "parameters that a token passes, N"),
        "loss_tokens": partial(_loss_profile, curves, "D", "training tokens D"),
        "iso_flops": partial(_iso_flops, iso),
        **{f"iso_loss_{law}": partial(_iso_loss, law, said) for law, said in iso.items()},
    }


# Loss against one number --------------------------------------------------------------------------------------------------


def _grid(count: int, **shared: Any) -> list[Axes]:
    """Panels of laws, three a row; what is left over is taken away."""
    rows = -(-count // COLUMNS)
    grid = [axes for row in panels(rows, COLUMNS, 13, 3.4 * rows + 0.9, **shared) for axes in row]
    for axes in grid[count:]:
        axes.remove()
    return grid[:count]


def _label(grid: list[Axes], x_label: str) -> None:
    """Names the axes at the left and below, also below a panel that was taken away."""
    for place, axes in enumerate(grid):
        axes.set(xscale="log", ylabel="" if place % COLUMNS else "loss")
        if place + COLUMNS >= len(grid):
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)


def _points(axes: Axes, x: Numbers, y: Numbers, outside: Sequence[bool], colour: str, label: str) -> None:
    """A line with marks, hollow where it is outside."""
    (line,) = axes.plot(x, y, "-", color=colour, linewidth=1.2, label=label)
    for hollow, face in ((False, colour), (True, "white")):
        mask = np.array([bool(one) == hollow for one in outside])
        axes.plot(x[mask], y[mask], "o", color=colour, markerfacecolor=face, markersize=4, zorder=line.get_zorder() + 0.1)


def _column(rows: list[Facts], name: str) -> Numbers:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _loss_flops(curves: Facts) -> Axes:
    """The least loss within the limits, beside the best dense shape without: their distance along x is C_dense/C."""
    grid = _grid(len(curves["laws"]), sharex=True)
    for axes, (law, said) in zip(grid, curves["laws"].items(), strict=True):
        rows, budget = said["best"], curves["flops"]
        axes.plot(said["dense"]["flops"], said["dense"]["loss"], color="grey", linewidth=1, label="best dense shape, no limits")
        _points(axes, _column(rows, "flops"), _column(rows, "loss"), _outside(rows), "C0", "best design within the limits")
        _band(axes, rows, "flops", "C0")
        axes.axvline(budget, color="black", linestyle=":", linewidth=1, label="the budget")
        here = min(rows, key=lambda row: abs(np.log(row["flops"] / budget)), default=None)
        at_budget = here is not None and np.isclose(here["flops"], budget)
        chosen = f"{here['name']}: C_dense/C {here['compute_multiplier']:.2f}" if here and at_budget else "nothing at the budget"
        axes.set_title(f"{law} ({said['interval']})\n{chosen}", fontsize="small")
    figure_of(grid[0]).suptitle("least loss against training FLOPs: compare within a panel only", fontsize="medium")
    _label(grid, "training FLOPs C")
    legend_below(grid[:1], 4, f"{BAND}; {RANGE}. Above the grey line: worse than dense without limits")
    return grid[0]


def _loss_profile(curves: Facts, symbol: str, meaning: str) -> Axes:
    """Loss at the budget against N or D, a line for each group of designs."""
    grid = _grid(len(curves["laws"]), sharex=True)
    for axes, (law, said) in zip(grid, curves["laws"].items(), strict=True):
        groups = said["profiles"][symbol]
        best = min((row for rows in groups.values() for row in rows), key=lambda row: row["loss"])
        for number, (group, rows) in enumerate(groups.items()):
            if rows:
                _points(axes, _column(rows, symbol), _column(rows, "loss"), _outside(rows), f"C{number}", group)
                _band(axes, rows, symbol, f"C{number}")
        axes.plot(best[symbol], best["loss"], "*", color="black", markersize=9, zorder=5, label="least loss")
        axes.set_ylim(best["loss"] - 0.2 * _ROOM, best["loss"] + _ROOM)
        axes.set_title(f"{law} ({said['interval']})\n{best['name']}", fontsize="small")
    title = f"loss at {curves['flops']:.3g} training FLOPs: the best design within the limits of each {symbol}"
    figure_of(grid[0]).suptitle(f"{title}: compare within a panel only", fontsize="medium")
    _label(grid, meaning)
    legend_below(grid, 5, f"{BAND}; {RANGE}. Lines end where the limits do")
    return grid[0]


def _band(axes: Axes, rows: list[Facts], symbol: str, colour: str) -> None:
    axes.fill_between(_column(rows, symbol), _column(rows, "low"), _column(rows, "high"), color=colour, alpha=0.18, linewidth=0)


def _outside(rows: list[Facts]) -> list[bool]:
    return [bool(row["out_of_range"]) for row in rows]


# One loss -----------------------------------------------------------------------------------------------------------------


def _iso_flops(iso: Facts) -> Axes:
    """Training FLOPs along each axis over the reference's, a line a law: each law by its own loss of the reference."""
    shown = [axis for axis in AXES if any(axis in said["axes"] for said in iso.values())]
    row = panels(1, len(shown), _width(shown), 4.8, sharey=True)[0]
    middles = [
        _end(rows, "flops", "middle") / said["reference"]["flops"] for said in iso.values() for rows in said["axes"].values()
    ]
    limits = _limits(middles)
    for axes, axis in zip(row, shown, strict=True):
        for number, (law, said) in enumerate(iso.items()):
            rows, reference = said["axes"][axis], said["reference"]
            x = _column(rows, "value") / (reference["D"] if axis == "D" else 1.0)
            _points(axes, x, _end(rows, "flops", "middle") / reference["flops"], _outside(rows), f"C{number}", law)
            _ends(axes, x, rows, "flops", f"C{number}", limits, reference["flops"])
        _flops_axis(axes, axis, "D over the reference's" if axis == "D" else AXES[axis], limits)
        ticks = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    row[0].set_ylabel("training FLOPs over the best dense shape's")
    title = "training FLOPs that reach the loss of the best dense shape of the budget, by each law"
    figure_of(row[0]).suptitle(title, fontsize="medium")
    legend_below(row[:1], 2 * len(shown), f"{BAND}; {RANGE}")
    return row[0]


def _iso_loss(law: str, said: Facts) -> Axes:
    """Above: N that goes with each value of an axis, a line a loss. Below: the FLOPs along the line of the reference's loss."""
    shown = [axis for axis in AXES if axis in said["axes"]]
    upper, lower = panels(2, len(shown), _width(shown), 8.2, sharex="col", sharey="row")
    for above, below, axis in zip(upper, lower, shown, strict=True):
        _contours(above, axis, said)
        _flops(below, axis, said)
    upper[0].set_ylabel("N of each loss")
    lower[0].set_ylabel("training FLOPs of the thick line")
    title = f"{law}: what has one loss ({said['interval']})"
    figure_of(upper[0]).suptitle(title, fontsize="medium")
    legend_below([upper[0], *lower], 4, f"{BAND}; {RANGE}")
    return upper[0]


def _width(shown: list[str]) -> float:
    """Inches: titles and the legend want some."""
    return max(8.5, 4.4 * len(shown) + 0.6)


def _contours(axes: Axes, axis: str, said: Facts) -> None:
    rows, reference = said["axes"][axis], said["reference"]
    x = _column(rows, "value")
    every = [np.array(row["N_at_levels"], dtype=np.float64) for rows in said["axes"].values() for row in rows]
    limits = _limits(every)
    for number, level in enumerate(said["levels"]):
        n = np.array([row["N_at_levels"][number] for row in rows], dtype=np.float64)
        thick = TIMES_N[number] == 1
        axes.plot(x, n, color="C0" if thick else f"C{number + 1}", linewidth=2.2 if thick else 0.9, label=f"loss {level:.3f}")
    _ends(axes, x, rows, "N", "C0", limits)
    axes.set(ylim=limits, yscale="log", title=_held(axis, reference, said["k"]))


def _flops(axes: Axes, axis: str, said: Facts) -> None:
    rows = said["axes"][axis]
    x, flops = _column(rows, "value"), _end(rows, "flops", "middle")
    limits = _limits([_end(rows, "flops", "middle") for rows in said["axes"].values()])
    axes.axhline(said["reference"]["flops"], color="grey", linestyle=":", label="the budget")
    _points(axes, x, flops, _outside(rows), "C0", "")
    _ends(axes, x, rows, "flops", "C0", limits)
    heavy = [row["memory_bytes"] is not None and row["memory_bytes"] > said["memory_limit"] for row in rows]
    if any(heavy):
        axes.plot(x, np.where(heavy, flops, np.nan), "x", color="black", markersize=8, label="over the memory at inference")
    _flops_axis(axes, axis, AXES[axis], limits)


def _limits(columns: list[Numbers]) -> tuple[float, float]:
    """Of an axis that holds all these numbers, with some room."""
    known = np.concatenate(columns)
    known = known[np.isfinite(known)]
    return float(known.min() / 1.3), float(known.max() * 1.3)


def _held(axis: str, reference: Facts, k: int) -> str:
    """What stays the same along an axis."""
    tokens = f"D = {reference['D']:.3g}"
    return {"P": f"{tokens}, dense", "E": f"{tokens}, k = {k}", "D": "dense, one stream"}[axis]


def _flops_axis(axes: Axes, axis: str, label: str, limits: tuple[float, float]) -> None:
    axes.set(ylim=limits, yscale="log", xscale="log", xlabel=label)
    if axis != "D":
        ticks = sorted(
            {float(value) for line in axes.lines if line.get_marker() == "o" for value in np.asarray(line.get_xdata())}
        )
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())


def _end(rows: list[Facts], name: str, end: str) -> Numbers:
    return np.array([row[name][end] for row in rows], dtype=np.float64)


def _ends(
    axes: Axes, x: Numbers, rows: list[Facts], name: str, colour: str, limits: tuple[float, float], over: float = 1.0
) -> None:
    """The band, cut at the panel's limits; open above where no model is large enough."""
    least, most = _end(rows, name, "least") / over, _end(rows, name, "most") / over
    known = np.isfinite(_end(rows, name, "middle"))
    least = np.clip(np.where(np.isnan(least), limits[0], least), limits[0] / 2, None)
    most = np.clip(np.where(np.isnan(most), limits[1] * 2, most), None, limits[1] * 2)
    axes.fill_between(x, least, most, where=list(known), color=colour, alpha=0.15, linewidth=0)
