"""The scaling of a run as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megascale.observe.console import format_count


def scaling_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A row for each number of GPUs, then those that train nothing, with the reason."""
    sizes = facts["parameters"]
    counts = f"{format_count(sizes['total'])} parameters, {format_count(sizes['active'])} active"
    yield f"{facts['scaling']} scaling of {facts['run']} ({counts}) on {facts['cluster']}; {format_count(facts['tokens'])} tokens"
    yield ""
    yield (
        f"{'GPUs':>9}{'tokens/step':>13}{'s/step':>9}{'tokens/s':>10}{'a GPU':>8}{'efficiency':>12}{'MFU':>7}"
        f"{'days':>9}{'goodput':>9}  {'binds':<11}layout"
    )
    for row in facts["points"]:
        yield (
            f"{row['gpus']:>9,}{format_count(row['step_tokens']):>13}{row['step_seconds']:>9.3f}"
            f"{format_count(row['tokens_per_second']):>10}{format_count(row['tokens_per_second_per_gpu']):>8}"
            f"{row['efficiency']:>12.1%}{row['mfu']:>7.1%}{_days(row['cost']['days']):>9}{row['cost']['goodput']['share']:>9.1%}"
            f"  {row['binds']:<11}{row['layout']}"
        )
    for one in facts["left_out"]:
        yield f"{one['gpus']:>9,}  none: {one['reason']}"
        yield f"{'':>9}  -> {one['remedy']}"
    yield ""
    yield from facts["notes"]


def _days(days: float | None) -> str:
    if days is None:
        return "never"
    return f"{days:.3f}" if days < 1 else f"{days:.1f}" if days < 1e5 else f"{days:.2g}"
