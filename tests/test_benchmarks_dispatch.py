"""The benchmark of expert dispatch: all forms of a part compute the same, and the tables hold what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernel_dispatch
from benchmarks.kernel_dispatch import Shape, layer_rows, rows

TINY = Shape(64, 64, 4, 2, 32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small shape, nothing compiled."""
    monkeypatch.setattr(kernel_dispatch, "SMALL_SHAPES", [TINY])
    monkeypatch.setattr(torch, "compile", lambda form=None, **_: form if form is not None else lambda f: f)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


def test_forms_of_a_part_are_the_same_function() -> None:
    for part in kernel_dispatch._parts(TINY, CPU):
        if part.name == "sort":  # one form gives something else, at the same cost
            continue
        results = []
        for form in part.forms.values():
            leaves = [x for x in part.inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            out = form(*part.inputs)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)


def test_every_part_and_form_has_a_row_with_its_floor() -> None:
    table = rows(CPU, True)
    assert {row["form"] for row in table} >= {"ours", "eager", "compiled", "eager, index_add", "eager, one-hot"}
    permuted = next(row for row in table if row["case"].endswith("copies, forward") and row["form"] == "ours")
    assert permuted["floor GB"] == pytest.approx((1 + 2) * 2 * 64 * 64 / 1e9)
    assert all(row["ms"] > 0 and row["share of floor"] > 0 for row in table)


def test_the_layer_has_a_row_for_each_form() -> None:
    table = layer_rows(CPU, True)
    assert {row["form"] for row in table} >= {"ours", "plain, eager", "plain, compiled"}
    for row in table:
        assert row["TFLOP/s"] == pytest.approx(18 * 128 * 64 * 32 / row["ms"] / 1e9)
