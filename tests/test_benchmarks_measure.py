"""`benchmarks.measure`: what a kernel's table compares."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import form_rows

TIMES = {"ours": 2.0, "slow": 8.0, "quick": 4.0, "floor": 1.0}


def _rows(*forms: str, rival: tuple[str, float] | None = None) -> list[dict]:
    runs = dict.fromkeys(forms, lambda: None)
    return form_rows(torch.device("cpu"), "T=1", runs, TIMES, TIMES["floor"], {"GB": 3.0}, rival)


def test_forms_are_compared_with_the_best_other_and_with_the_floor() -> None:
    ours, slow, quick = _rows("ours", "slow", "quick")
    assert ours == {
        "case": "T=1", "form": "ours", "ms": 2.0, "best other / this": 2.0,
        "floor ms": 1.0, "share of floor": 0.5, "floor GB": 3.0, "peak MiB": None,
    }  # fmt: skip
    assert (slow["best other / this"], quick["best other / this"]) == (0.5, 1.0)


@pytest.mark.parametrize("rival, key, ratio", [(None, "best other / this", 1.0), (("compiled", 6.0), "compiled / this", 3.0)])
def test_a_form_without_others_is_its_own_rival_unless_one_is_named(
    rival: tuple[str, float] | None, key: str, ratio: float
) -> None:
    (row,) = _rows("ours", rival=rival)
    assert row[key] == ratio
