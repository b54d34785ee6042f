"""What all pictures share: panels, curves that are dashed outside a range, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megascale.config.errors import InputError


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> list[list[Axes]]:
    """Rows of empty panels of one figure, inches; `shared` goes to matplotlib's `subplots` (sharex, sharey, width_ratios)."""
    grid = Figure(figsize=(width, height), layout="constrained").subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return [list(row) for row in grid]


def curve(axes: Axes, x: NDArray[Any], y: NDArray[Any], outside: NDArray[np.bool_], label: str, **style: Any) -> Any:
    """Draws a curve, dashed where it is outside; returns its colour."""
    (line,) = axes.plot(x, np.where(outside, np.nan, y), label=label, **style)
    axes.plot(x, np.where(outside, y, np.nan), **{**style, "linestyle": "--", "color": line.get_color(), "linewidth": 1})
    return line.get_color()


def save(axes: Axes, path: Path) -> None:
    """Writes the figure of a panel.

    Raises:
        InputError: the path cannot be written, or its ending is none that matplotlib knows.
    """
    try:
        figure_of(axes).savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"cannot be written: {error}", "give a path that ends in .png, .pdf or .svg") from error


def figure_of(axes: Axes) -> Figure:
    """The figure of a panel."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "made by panels"
    return figure


def legend_below(panels_of: Sequence[Axes], columns: int, title: str) -> None:
    """One legend for a whole figure, below it, with the entries of some of its panels, each once."""
    entries: dict[str, Any] = {}
    for axes in panels_of:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure_of(panels_of[0]).legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
        title=title,
        title_fontsize="small",
    )
