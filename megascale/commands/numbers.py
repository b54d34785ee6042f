"""Numbers that several forms of a verb read, and the defaults that say whether one was given."""

from __future__ import annotations

from megascale.config.errors import InputError

TOP, IMBALANCE = 10, 1.0
"""of `megascale plan`: layouts to show; rows of the fullest rank's experts over an even share"""


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers with commas between, ascending, each once; InputError for other text."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(option, f"{text!r} is no list of whole numbers", "give for example 1,2,4") from error
