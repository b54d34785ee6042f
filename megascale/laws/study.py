"""A fit with all that must be said beside it: intervals, errors on runs that were not fitted, and what the design cannot separate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.config.errors import InputError
from megascale.laws.fit import Fit, FitOptions, fit
from megascale.laws.form import Array, Inputs
from megascale.laws.holdout import SizeHoldout, largest_size, leave_one_out
from megascale.laws.identify import Identifiability, identifiability
from megascale.laws.registry import form_named
from megascale.laws.table import RunTable
from megascale.laws.uncertainty import Draws, bootstrap

FORMAT = 1
"""of saved studies"""

Box = Mapping[str, tuple[float, float]]


def outside_box(box: Box, inputs: Inputs) -> dict[str, NDArray[np.bool_]]:
    """Where inputs leave a box, by symbol; only symbols that do so somewhere."""
    flags = {}
    for symbol, (low, high) in box.items():
        value = np.asarray(inputs[symbol])
        flags[symbol] = (value < low * (1 - 1e-9)) | (value > high * (1 + 1e-9))
    return {symbol: flag for symbol, flag in flags.items() if np.any(flag)}


@dataclass(frozen=True)
class Study:
    """A fitted form and its diagnosis."""

    fit: Fit
    table: RunTable
    draws: Draws
    left_out: Array
    """log residual of each run under the fit of the others"""
    size_holdout: SizeHoldout | str
    identifiability: Identifiability

    @property
    def left_out_rmsle(self) -> float:
        """Root mean square log error of runs left out one at a time."""
        return float(np.sqrt(np.nanmean(self.left_out**2)))

    @property
    def box(self) -> Box:
        """Least and largest value of each input."""
        columns = self.table.inputs(self.fit.form.inputs)
        return {symbol: (float(column.min()), float(column.max())) for symbol, column in columns.items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of each parameter."""
        found = {}
        for name in self.fit.form.names if self.draws.values else ():
            low, high = self.draws.interval(itemgetter(name))
            found[name] = (float(low), float(high))
        return found

    def outside(self, inputs: Inputs) -> dict[str, NDArray[np.bool_]]:
        """Where inputs leave the box of the fitted runs, by symbol."""
        return outside_box(self.box, inputs)

    def facts(self) -> dict[str, Any]:
        """Everything, for printing or as JSON."""
        intervals = self.intervals()
        return {
            "form": self.fit.form.name,
            "formula": self.fit.form.formula,
            "place": self.table.place,
            "runs": len(self.table),
            "notes": list(self.table.notes),
            "parameters": {
                name: {"value": value, "low": intervals.get(name, (None, None))[0], "high": intervals.get(name, (None, None))[1]}
                for name, value in self.fit.values.items()
            },
            "rmsle": self.fit.rmsle,
            "r_squared": self.fit.r_squared,
            "huber_delta": self.fit.delta,
            "starts_at_optimum": self.fit.starts_at_optimum,
            "leave_one_out_rmsle": self.left_out_rmsle,
            "largest_size": self.size_holdout if isinstance(self.size_holdout, str) else asdict(self.size_holdout),
            "condition": self.identifiability.condition,
            "weak": [list(group) for group in self.identifiability.weak],
            "at_zero": list(self.identifiability.at_zero),
            "bootstrap": {"draws": len(self.draws.values), "failed": self.draws.failed},
            "range": {symbol: list(ends) for symbol, ends in self.box.items()},
        }


def study(name: str, table: RunTable, options: FitOptions | None = None, draws: int = 200) -> Study:
    """Fit a form and diagnose the fit.

    Raises:
        FitRefused: the table cannot carry the form (too few runs, an input that does not vary, parameters that cannot be separated).
    """
    options = options or FitOptions()
    whole = fit(form_named(name), table, options)
    judged = identifiability(whole, table.inputs(whole.form.inputs), table.place)
    return Study(
        whole,
        table,
        bootstrap(whole, table, draws, options.seed),
        leave_one_out(whole, table),
        largest_size(whole, table, options),
        judged,
    )


def document(found: Study) -> str:
    """A study as JSON: its facts, and the drawn parameters for intervals of predictions."""
    return json.dumps({"format": FORMAT, **found.facts(), "draws": list(found.draws.values)}, indent=1)


def save(found: Study, path: Path) -> None:
    """Write a study as JSON, for `load`."""
    path.write_text(document(found), encoding="utf-8")


@dataclass(frozen=True)
class SavedFit:
    """What predictions need of a saved study."""

    draws: Draws
    values: dict[str, float]
    box: Box
    """least and largest value of each input among the runs"""
    place: str

    def outside(self, inputs: Inputs) -> dict[str, NDArray[np.bool_]]:
        """Where inputs leave the box of the fitted runs, by symbol."""
        return outside_box(self.box, inputs)


def load(path: Path) -> SavedFit:
    """Read a saved study. InputError when the file is none, or cannot be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise InputError(str(path), f"format {facts['format']}, this version reads {FORMAT}", "fit again")
        form = form_named(facts["form"])
        values = {name: facts["parameters"][name]["value"] for name in form.names}
        draws = Draws(form, tuple(facts["draws"]), facts["bootstrap"]["failed"])
        return SavedFit(draws, values, {symbol: tuple(facts["range"][symbol]) for symbol in form.inputs}, facts["place"])
    except FileNotFoundError as error:
        raise InputError(
            str(path), "there is no such file", "write one: megascale laws fit FORM --runs TABLE --save FILE.json"
        ) from error
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}", "give the file that laws fit --save wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            str(path), f"is no saved fit ({error!r})", "write one: megascale laws fit FORM --runs TABLE --save FILE.json"
        ) from error
