"""Predictions of several laws on a grid of inputs: values, what lies out of range, and how far the laws disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from megascale.config.errors import InputError
from megascale.laws.form import meaningless
from megascale.laws.law import Law, Quantity
from megascale.laws.study import SavedFit

Point = Mapping[str, float]


def grid(at: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the values. InputError for a value that is not positive and finite, or that no model can have."""
    for symbol, values in at.items():
        for value in values:
            if (why := meaningless(symbol, value)) is not None:
                raise InputError(f"--at {symbol}", f"{value:g} {why}", "give numbers that a model can have: N=1e9,2e9")
    return [dict(zip(at, values, strict=True)) for values in product(*at.values())]


def predict(laws: Sequence[Law], at: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """What each law says at each point: law, quantity, unit, inputs, value, and the symbols that leave its range.

    `derived`: the values of those that are not given but follow from the inputs, such as the best N for C.

    Raises:
        InputError: a symbol that no law has, an input that is no positive number, inputs that determine nothing.
    """
    known = {symbol for law in laws for symbol in law.given}
    for symbol in at:
        if symbol not in known:
            needs = "; ".join(f"{law.name}: {', '.join(law.given)}" for law in laws)
            raise InputError(f"--at {symbol}", "is no input of the law", f"inputs: {needs}")
    points = grid(at)
    rows = []
    for law in laws:
        own = [{symbol: value for symbol, value in point.items() if symbol in law.given} for point in points]
        for quantity in law.answerable({symbol: np.asarray(value) for symbol, value in own[0].items()}):
            seen = set()
            for point in own:
                used = {symbol: point[symbol] for symbol in quantity.inputs}
                if tuple(used.values()) not in seen:
                    seen.add(tuple(used.values()))
                    rows.append(_row(law, quantity, used))
    return rows


def _row(law: Law, quantity: Quantity, used: Point) -> dict[str, Any]:
    inputs = {symbol: np.asarray([value]) for symbol, value in used.items()}
    with np.errstate(all="ignore"):
        value = float(np.ravel(law.predict(quantity.name, inputs))[0])
        outside, derived = law.outside(inputs, quantity), law.derived(quantity, inputs)
    return {
        "law": law.name,
        "quantity": quantity.name,
        "unit": quantity.unit,
        "inputs": dict(used),
        "value": value,
        "out_of_range": {s: _range(law, s) for s in outside},
        "derived": {s: float(np.ravel(derived[s])[0]) for s in law.outside(derived)},
        "depends_on_corpus": quantity.depends_on_corpus,
        "corpus": law.corpus,
    }


def _range(law: Law, symbol: str) -> list[float]:
    variable = law.variables[symbol]
    return [variable.low, variable.high]


def disagreements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where two laws or more predict the same quantity at compatible inputs: the spread, largest over smallest.

    Losses are compared within each corpus only: another corpus or tokenizer shifts them. What is not compared is said, with the laws
    of each corpus in `groups`. All other quantities are compared always.
    Laws may need different inputs for one quantity: inputs are compatible when the shared ones are equal.
    """
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys(row["quantity"] for row in rows):
        asked = [row for row in rows if row["quantity"] == name]
        # Without a loss there is one group.
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in asked:
            groups.setdefault(row["corpus"] if row["depends_on_corpus"] else "", []).append(row)
        for group in groups.values():
            found += _spreads(name, group)
        if len(groups) > 1:
            laws = [sorted({row["law"] for row in group}) for group in groups.values()]
            found.append({"quantity": name, "groups": laws, "not_compared": "measured on different corpora"})
    return found


def _spreads(name: str, group: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    widest = max(group, key=lambda row: len(row["inputs"]))["law"]
    for base in (row for row in group if row["law"] == widest):
        values = {row["law"]: row["value"] for row in group if _compatible(row["inputs"], base["inputs"])}
        finite = [value for value in values.values() if np.isfinite(value) and value > 0]
        if len(finite) > 1:
            found.append({"quantity": name, "inputs": base["inputs"], "values": values, "spread": max(finite) / min(finite)})
    return found


def _compatible(one: Point, other: Point) -> bool:
    return all(one[symbol] == other[symbol] for symbol in one.keys() & other.keys())


def predict_saved(saved: SavedFit, at: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The same for one of our fits, with 95 % intervals (`low`, `high`) where it was saved with a bootstrap.

    Raises:
        InputError: inputs that are missing or that the form does not have.
    """
    form = saved.draws.form
    if set(at) != set(form.inputs):
        raise InputError(
            "--at", f"gives {', '.join(at) or 'nothing'}; {form.name} needs {', '.join(form.inputs)}", "give these inputs"
        )
    rows = []
    for point in grid(at):
        inputs = {symbol: np.asarray([value]) for symbol, value in point.items()}
        ends = saved.draws.predictions(inputs) if saved.draws.values else ()
        rows.append({
            "law": f"{form.name} fitted to {saved.place}", "quantity": "loss", "unit": "as fitted", "inputs": point,
            "value": float(form.evaluate(saved.values, inputs)[0]),
            **{name: float(end[0]) for name, end in zip(("low", "high"), ends, strict=False)},
            "out_of_range": {symbol: list(saved.box[symbol]) for symbol in saved.outside(inputs)},
        })  # fmt: skip
    return rows
