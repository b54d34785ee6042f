"""Scaling as a picture: tokens a second beside the ideal, efficiency and MFU, and where the step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megascale.observe.figures import panels, save

PARTS = {
    "compute": ("products", "attention", "experts"),
    "passes": ("passes",),
    "recompute": ("recompute",),
    "tp, cp, stream, ep": ("tp", "cp", "stream", "ep"),
    "pp": ("pp",),
    "dp": ("dp",),
    "optimizer": ("optimizer",),
    "bubble": ("bubble",),
    "straggle": ("straggle",),
}
"""What is drawn as one part of a step."""


def plot_scaling(facts: dict[str, Any], path: Path) -> None:
    """Writes the picture of `megascale.plan.scaling.scaling_facts`.

    Raises:
        InputError: the file cannot be written.
    """
    save(draw_scaling(facts)[0], path)


def draw_scaling(facts: dict[str, Any]) -> list[Axes]:
    """Three panels: tokens a second, efficiency, parts of a step."""
    speed, efficiency, step = panels(1, 3, 15, 4.6, width_ratios=(1, 1, 1.25))[0]
    rows = facts["points"]
    gpus = np.array([row["gpus"] for row in rows], dtype=np.float64)
    _speed(speed, facts, gpus)
    _efficiency(efficiency, rows, gpus)
    _step(step, rows)
    for axes in (speed, efficiency):
        axes.set(xscale="log", xlabel="GPUs")
        _compared(axes, float(gpus[-1]), facts["compared_up_to"])
        axes.legend(fontsize="small", loc="best")
    return [speed, efficiency, step]


def _column(rows: list[dict[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _speed(axes: Axes, facts: dict[str, Any], gpus: NDArray[np.float64]) -> None:
    rows = facts["points"]
    axes.plot(
        gpus, _column(rows, "ideal_tokens_per_second"), ":", color="grey", label=f"ideal: in proportion to {int(gpus[0]):,}"
    )
    axes.plot(gpus, _column(rows, "tokens_per_second"), "o-", markersize=4, label="planned")
    axes.plot(gpus, _column(rows, "useful_tokens_per_second"), "s--", markersize=3, label="planned, failures counted")
    axes.set(yscale="log", ylabel="tokens / s", title=f"{facts['scaling']} scaling of {facts['run']}, {facts['cluster']}")


def _efficiency(axes: Axes, rows: list[dict[str, Any]], gpus: NDArray[np.float64]) -> None:
    axes.axhline(1, linestyle=":", color="grey", label="ideal")
    axes.plot(gpus, _column(rows, "efficiency"), "o-", markersize=4, label="efficiency")
    useful = _column(rows, "useful_tokens_per_second") / _column(rows, "ideal_tokens_per_second")
    axes.plot(gpus, useful, "s--", markersize=3, label="efficiency, failures counted")
    axes.plot(gpus, _column(rows, "mfu"), "^-", markersize=4, label="MFU")
    axes.set(
        ylim=(0, max(1.08, 1.05 * float(_column(rows, "efficiency").max()))),
        ylabel="share",
        title=f"tokens/s a GPU over {int(gpus[0]):,} GPUs'",
    )


def _step(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Shares of a step as stacked bars, one a number of GPUs."""
    axes.set_axisbelow(True)
    places = np.arange(len(rows))
    below = np.zeros(len(rows))
    for index, (label, names) in enumerate(PARTS.items()):
        share = np.array([sum(row["shares"][name] for name in names) for row in rows])
        if share.max() > 0:
            axes.bar(places, share, bottom=below, label=label, color=f"C{index}")
        below += share
    axes.set_xticks(places, [f"{row['gpus']:,}" for row in rows], rotation=35, ha="right", fontsize="small")
    axes.set(ylim=(0, 1), ylabel="share of a step", xlabel="GPUs", title="where a step goes")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _compared(axes: Axes, largest: float, compared: int) -> None:
    """Shades what is larger than any run that the planner was compared with."""
    if largest > compared:
        axes.axvspan(
            compared, largest * 1.3, color="grey", alpha=0.12, linewidth=0, label=f"above {compared:,}: larger than runs compared"
        )
        axes.set_xlim(right=largest * 1.3)
