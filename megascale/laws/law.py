"""What an entry of the registry holds, and how one is evaluated and checked against its range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megascale.config.errors import InputError
from megascale.laws.form import Array, Form, Inputs, Values

_LOSS_UNITS = ("nats per token", "bits")

Evidence = Literal["primary", "secondary", "fitted here", "not verified"]
"""Where the constants were read: the paper or its code; a text about it; our own fit; nowhere we could check."""


@dataclass(frozen=True)
class Constant:
    """One fitted number of a law."""

    value: float
    printed: str = ""
    """as the source prints it, where that is rounded or differs from the value used"""
    note: str = ""


@dataclass(frozen=True)
class Variable:
    """What a symbol means in this law, and where the law was fitted."""

    meaning: str
    unit: str
    low: float = 0.0
    high: float = float("inf")


@dataclass(frozen=True)
class Quantity:
    """Something a law predicts: the loss first, then what follows from it."""

    name: str
    unit: str
    inputs: tuple[str, ...]
    compute: Callable[[Values, Inputs], Array]
    meaning: str = ""
    dimensionless: bool = False
    """a ratio or a multiplier"""
    derives: Callable[[Values, Inputs], Inputs] | None = None
    """symbols that follow from the inputs on the way, such as the best N and D for C: they have a range too"""

    @property
    def depends_on_corpus(self) -> bool:
        """Whether it is a loss: another corpus or tokenizer shifts it."""
        return self.unit in _LOSS_UNITS


@dataclass(frozen=True)
class Law:
    """A published or fitted law."""

    name: str
    title: str
    formula: str
    source: str
    corpus: str
    """what the loss is measured on; losses of different corpora are not compared"""
    log_base: str
    evidence: Evidence
    constants: Mapping[str, Constant]
    variables: Mapping[str, Variable]
    """also ratios such as D/N, which have a range but are never given"""
    quantities: tuple[Quantity, ...]
    notes: tuple[str, ...] = ()
    form: Form | None = None
    """what fits it to runs; none where a table of losses cannot"""
    values: Values = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", {name: constant.value for name, constant in self.constants.items()})

    @property
    def given(self) -> tuple[str, ...]:
        """The symbols that can be given."""
        return tuple(symbol for symbol in self.variables if "/" not in symbol)

    def printed_values(self) -> dict[str, float]:
        """The constants as the source prints them."""
        return {name: float(constant.printed or constant.value) for name, constant in self.constants.items()}

    def quantity(self, name: str) -> Quantity:
        """The quantity of that name; InputError when the law has none."""
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        known = ", ".join(quantity.name for quantity in self.quantities)
        raise InputError(f"law {self.name}", f"predicts no {name!r}", f"it predicts {known}")

    def answerable(self, inputs: Inputs) -> tuple[Quantity, ...]:
        """The quantities that these inputs determine. InputError when there is none."""
        found = tuple(quantity for quantity in self.quantities if set(quantity.inputs) <= set(inputs))
        if not found:
            needs = "; ".join(f"{quantity.name} needs {', '.join(quantity.inputs)}" for quantity in self.quantities)
            raise InputError(f"law {self.name}", f"{', '.join(inputs) or 'nothing'} given: too little", f"give more: {needs}")
        return found

    def predict(self, name: str, inputs: Inputs, values: Values | None = None) -> Array:
        """A quantity at the inputs, with the registry's constants or other ones."""
        quantity = self.quantity(name)
        arrays = {symbol: np.asarray(inputs[symbol], dtype=np.float64) for symbol in quantity.inputs}
        return np.asarray(quantity.compute(values or self.values, arrays), dtype=np.float64)

    def derived(self, quantity: Quantity, inputs: Inputs) -> dict[str, Array]:
        """What the quantity derives from the inputs on its way, by symbol, and the ratios of it that have a range."""
        found = dict(quantity.derives(self.values, inputs)) if quantity.derives is not None else {}
        for symbol in self.variables:
            upper, _, lower = symbol.partition("/")
            if lower and upper in found and lower in found:
                found[symbol] = found[upper] / found[lower]
        return found

    def outside(self, inputs: Inputs, quantity: Quantity | None = None) -> dict[str, NDArray[np.bool_]]:
        """Where the range the law was fitted in is left, by symbol or ratio; only symbols that do so somewhere.

        With a quantity: by its own inputs, or by what it derives from them.
        """
        if quantity is None:
            return self._flags(inputs)
        own = {symbol: inputs[symbol] for symbol in quantity.inputs}
        flags = self._flags(own)
        for symbol, flag in self._flags(self.derived(quantity, own)).items():
            flags[symbol] = flags[symbol] | flag if symbol in flags else flag
        return flags

    def _flags(self, inputs: Inputs) -> dict[str, NDArray[np.bool_]]:
        known = {symbol: np.asarray(value, dtype=np.float64) for symbol, value in inputs.items()}
        flags = {}
        for symbol, variable in self.variables.items():
            upper, _, lower = symbol.partition("/")
            if upper in known and (not lower or lower in known):
                value = known[upper] / known[lower] if lower else known[upper]
                # A range is printed with few digits: its ends are inside.
                flags[symbol] = (value < variable.low * (1 - 1e-6)) | (value > variable.high * (1 + 1e-6))
        return {symbol: flag for symbol, flag in flags.items() if np.any(flag)}

    def centre(self) -> dict[str, Array]:
        """The middle of the range of every symbol, on a log scale; symbols with an open range are left out."""
        closed = {s: v for s, v in self.variables.items() if "/" not in s and v.low > 0 and np.isfinite(v.high)}
        return {symbol: np.asarray([np.sqrt(variable.low * variable.high)]) for symbol, variable in closed.items()}


def printed_error(law: Law) -> float | None:
    """By how much the first quantity changes at the centre of the range when the printed constants are used, relative.

    None where nothing is printed differently, or the range is open.
    """
    if not any(constant.printed and float(constant.printed) != constant.value for constant in law.constants.values()):
        return None
    centre, first = law.centre(), law.quantities[0]
    if not set(first.inputs) <= set(centre):
        return None
    used, printed = law.predict(first.name, centre), law.predict(first.name, centre, law.printed_values())
    return float(printed[0] / used[0] - 1)


def rounding_effects(law: Law) -> dict[str, dict[str, float]]:
    """By how much half a unit in the last printed digit of each constant moves quantities at the centre of the range, relative.

    The quantities are the first and the dimensionless ones, without those of an open range. Only constants that are used as printed.
    """
    centre, effects = law.centre(), {}
    asked = [q.name for q in law.quantities if (q is law.quantities[0] or q.dimensionless) and set(q.inputs) <= set(centre)]
    for name, constant in law.constants.items():
        if constant.printed and float(constant.printed) == constant.value:
            digits, _, exponent = constant.printed.lower().partition("e")
            half = 0.5 * 10 ** (int(exponent or 0) - len(digits.partition(".")[2]))
            values = {**law.values, name: constant.value + half}
            effects[name] = {q: float(abs(law.predict(q, centre, values)[0] / law.predict(q, centre)[0] - 1)) for q in asked}
    return effects
