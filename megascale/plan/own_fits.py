"""What runs of one's own add to the published laws in the search over axes: laws of N and D, and a_K of AltUp's blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megascale.config.errors import InputError
from megascale.laws.families.axes import blocks_worth
from megascale.laws.form import Array
from megascale.laws.study import SavedFit, load, outside_box
from megascale.plan.hypothesis import Base, Effective, Sizes, bases

ROLES = {"chinchilla": "a law of N and D", "blocks": "a_K"}
"""form of a saved fit -> what the search takes it for"""


@dataclass(frozen=True)
class Own:
    """Nothing, unless given: the search then knows the published laws only, and a_K = 1."""

    bases: tuple[Base, ...] = ()
    given: Mapping[int, float] = field(default_factory=dict)
    """a_K by K, typed in"""
    name: str = ""
    """of the fit of a_K"""
    fit: SavedFit | None = None
    """a_K = K^b, instead"""

    def worth(self, blocks: Array) -> Effective:
        """a_K of some models, with the 95 % interval of the fit; 1 where nothing is known."""
        if self.fit is None:
            known = np.array([self.given.get(int(count), 1.0) for count in blocks])
            return Effective(known, known, known)
        middle = blocks_worth(self.fit.values, blocks)
        if not self.fit.draws.values:
            return Effective(middle, middle, middle)
        low, high = self.fit.draws.interval(lambda values: blocks_worth(values, blocks))
        return Effective(low, middle, high)

    def outside(self, sizes: Sizes) -> dict[str, list[str]]:
        """The fit of a_K -> symbols in which one model leaves its runs; models without blocks do not ask it."""
        if self.fit is None or sizes.blocks[0] == 1:
            return {}
        flags = list(outside_box(self.fit.box, {"N": sizes.non_embedding, "K": sizes.blocks}))
        return {self.name: flags} if flags else {}

    @property
    def caveat(self) -> str:
        """Where a_K is from."""
        if self.fit is not None:
            return f"a_K = K^b with b = {self.fit.values['b']:.4f}, fitted to runs of yours ({self.name})"
        if self.given:
            return f"a_K as given: {', '.join(f'{blocks}={worth:g}' for blocks, worth in sorted(self.given.items()))}, without an interval"
        return "a_K = 1: no law of blocks (AltUp) is published; fit it to runs of yours (laws fit blocks)"


def read_own(paths: Sequence[Path], given: Mapping[int, float]) -> Own:
    """Saved fits (`megascale laws fit FORM --save FILE`), by the names of their files, and what a_K was typed in.

    Raises:
        InputError: no saved fit, one of a form that the search has no use for, two of a_K, or a name that is taken.
    """
    found: list[Base] = []
    worth: tuple[str, SavedFit | None] = ("", None)
    taken = {base.name for base in bases(0)}
    for path in paths:
        fit, name = load(path), path.stem
        form = fit.draws.form.name
        if form not in ROLES:
            known = " and ".join(f"{form} ({role})" for form, role in ROLES.items())
            raise InputError("--fit", f"{path} is a fit of {form}, which the search has no use for", f"it takes fits of {known}")
        if name in taken:
            raise InputError("--fit", f"there is a law {name!r} already", f"give {path} another name")
        taken.add(name)
        if form == "chinchilla":
            found.append(_base(name, fit))
        elif given:
            raise InputError("--fit", f"{path} and --blocks-worth both say what blocks are worth", "leave one of them out")
        elif worth[1] is not None:
            raise InputError("--fit", f"{path} and {worth[0]} both say what blocks are worth", "give one fit of blocks")
        else:
            worth = name, fit
    return Own(tuple(found), dict(given), *worth)


def _base(name: str, fit: SavedFit) -> Base:
    draws = tuple(values for values in fit.draws.values if all(map(math.isfinite, values.values())))
    interval = f"{len(draws)} refits of your runs" if draws else "not asked for when it was fitted"
    return Base(name, fit.place, fit.values, draws, interval, box=fit.box)
