"""Why a fit is refused. Each is an InputError with a place, a reason and a remedy, and has its own type for programs."""

from __future__ import annotations

from megascale.config.errors import InputError


class FitRefused(InputError):
    """A table of runs that cannot carry the fit asked for."""


class TooFewRuns(FitRefused):
    """Fewer different settings than the form has parameters and one more."""


class NotVaried(FitRefused):
    """An input of the form has one value in all runs."""


class NotSeparable(FitRefused):
    """Parameters whose effects on these runs are the same, or that have no effect."""


class NoOptimum(FitRefused):
    """No start of the search led to a finite fit."""


class BadTable(FitRefused):
    """A missing column, a cell that is no number, a loss that is not positive."""
