"""The one exception that a user sees for bad input: where, why, and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: a config, a corpus, a checkpoint, a layout. Programs exit with code 2.

    Args:
        place: what is wrong, as the user would find it (``configs/runs/a.yaml:12: model.width``, a file path).
        reason: what is wrong with it, with the numbers.
        remedy: what the user can do next; a command or a value where possible.
    """

    exit_code = 2
    told = False
    """whether the user has been told already: an error that all ranks raise is printed by one of them"""

    def __init__(self, place: str, reason: str, remedy: str = ""):
        self.place, self.reason, self.remedy = place, reason, remedy
        super().__init__(f"{place}: {reason}" + (f"\n  -> {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        return type(self), (self.place, self.reason, self.remedy)  # the default one would pass the whole text as the place
