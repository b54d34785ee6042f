"""What can be fitted: a formula with parameters, some of which enter linearly once the others are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = Mapping[str, float]
Inputs = Mapping[str, Array]


_DOMAINS = {
    "P": (1.0, np.inf, "one stream is a plain model"),
    "E": (1.0, np.inf, "one expert is a dense model"),
    "K": (1.0, np.inf, "one block is a plain model"),
    "k": (1.0, np.inf, "a token passes at least one expert"),
    "A": (0.0, 1.0, "it is a share"),
    "I": (0.0, 1e30, "nobody serves so many tokens"),
}
"""symbols with a meaning in part of the positive numbers only: least, most, why; the same in all laws and tables"""


def meaningless(symbol: str, value: float) -> str | None:
    """Why no model can have this value of an input; none where one can."""
    if not (np.isfinite(value) and value > 0):
        return "is not a positive number"
    least, most, why = _DOMAINS.get(symbol, (0.0, np.inf, ""))
    if least <= value <= most:
        return None
    return f"is below {least:g}: {why}" if value < least else f"is above {most:g}: {why}"


def meaningful_span(symbol: str, low: float, high: float) -> tuple[float, float]:
    """A span of an input without the values that no model can have."""
    least, most, _ = _DOMAINS.get(symbol, (0.0, np.inf, ""))
    return max(low, least), min(high, most)


@dataclass(frozen=True)
class Parameter:
    """A parameter that the search varies, and where it starts."""

    name: str
    low: float
    high: float
    """starts are drawn from here, uniformly, or uniformly in the logarithm when positive"""
    positive: bool = True
    least: float = -np.inf
    most: float = np.inf
    """bounds of the search"""
    below_loss: bool = False
    """an irreducible loss: `low` and `high` are shares of the least measured loss, which also bounds it"""


@dataclass(frozen=True)
class Linear:
    """A parameter found by linear least squares for each value of the others (variable projection).

    `of` turns its coefficient into the parameter, where the formula holds a function of it; it sees the values found so far.
    """

    name: str
    positive: bool = True
    of: Callable[[float, Values], float] | None = None


@dataclass(frozen=True)
class Form:
    """A family of curves over runs.

    `basis` gives the columns [runs, linear parameters] that the linear ones multiply; their sum is the loss, or its natural logarithm
    (`linear_in`), apart from the fixed part `offset`. Without linear parameters there is no basis.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    linear: tuple[Linear, ...]
    evaluate: Callable[[Values, Inputs], Array]
    basis: Callable[[Values, Inputs], Array] | None = None
    linear_in: Literal["loss", "log loss"] = "loss"
    size: str = "N"
    """the input whose largest value is held out"""
    offset: Callable[[Values, Inputs], Array] | None = None
    """what is taken off the loss before its logarithm (`linear_in` log loss): an irreducible part"""

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters: those of the search, then the linear ones."""
        return tuple(p.name for p in self.parameters) + tuple(p.name for p in self.linear)

    @property
    def positive(self) -> tuple[bool, ...]:
        """Which of them are positive, in the same order; they are searched on a log scale."""
        return tuple(p.positive for p in self.parameters) + tuple(p.positive for p in self.linear)
