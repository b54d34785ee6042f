"""The report of the search over axes as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megascale.observe.console import format_count
from megascale.plan.axis_report import AXES
from megascale.plan.hypothesis import ROUTED_LAWS, STREAM_LAWS

GIB = 2**30


def axis_lines(facts: dict[str, Any], details: int = 3) -> Iterator[str]:
    """The report for people; law by law for the first designs only."""
    yield from _head(facts)
    yield from _designs(facts, details)
    yield from _axes_lines(facts)
    yield from _closing(facts)


def _head(facts: dict[str, Any]) -> Iterator[str]:
    budget, limits, work = facts["budget"], facts["limits"], facts["workload"]
    bounds = [f"{limits['memory'] / GIB:.3g} GiB"]
    if limits["latency"] is not None:
        bounds.append(f"{limits['latency'] * 1e3:.3g} ms a token")
    if limits["unique"] is not None:
        bounds.append(f"{format_count(limits['unique'])} unique tokens")
    served = f", {format_count(budget['served_tokens'])} served tokens included" if budget["served_tokens"] else ""
    yield f"axes for {budget['flops']:.3g} FLOPs{served}; {', '.join(bounds)}; {facts['device']}, context {work['context']:,}, batch 1"
    for number, line in enumerate(facts["hypothesis"]):
        yield f"{'hypothesis' if not number else '':<11} {line}"
    tried = facts["candidates"]
    left = f"{tried['memory']} over the memory, {tried['latency']} over the latency, {tried['budget']} with D < N"
    yield f"candidates  {tried['tried']:,}: {left}; {tried['fits']} fit, {facts['dominated']} dominated, {len(facts['front'])} on the front"
    binds = ", ".join(facts["binds"]) or "nothing but the budget"
    worth = ", ".join(f"{name} x{gain:.2f}" for name, gain in facts["worth_of_twice"].items())
    half = " (served: of half)" if "served" in facts["worth_of_twice"] else ""
    ends = "; LIMITED BY THE GRID, see the caveats" if facts["grid_ends"] else ""
    yield f"binds       {binds}; worth of twice the limit in compute{half}: {worth}{ends}"


def _designs(facts: dict[str, Any], details: int) -> Iterator[str]:
    yield ""
    yield f"{'design':<30}{'N':>7}{'all':>7}{'D':>7}{'D/N':>6}{'GiB':>6}{'ms/token':>9}{'score':>7}  why it is shown"
    for row in facts["designs"]:
        yield (
            f"{row['name']:<30}{format_count(row['N']):>7}{format_count(row['parameters']):>7}{format_count(row['D']):>7}"
            f"{row['tokens_per_parameter']:>6.0f}{row['memory_bytes'] / GIB:>6.1f}{row['latency_seconds'] * 1e3:>9.1f}"
            f"{row['score']:>7.2f}  {'; '.join(row['roles'])}"
        )
    yield "score: median over the laws of the compute multiplier C_dense/C; N: what a token passes; all: all parameters"
    yield ""
    for row in facts["designs"][:details]:
        yield from _by_law(row)


def _by_law(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['name']}: {row['training_flops']:.3g} training FLOPs, prompt {row['prefill_seconds']:.2g} s"
    yield f"  {'law':<15}{'loss':<24}{'N_eff/N':<24}C_dense/C"
    for law, said in row["by_law"].items():
        flag = f"OUT OF RANGE: {', '.join(row['out_of_range'][law])}" if law in row["out_of_range"] else ""
        low, high = said["compute_multiplier_range"]
        least, _, most = said["N_eff/N"]
        loss = _ranged(said["loss"], said["low"], said["high"], 3)
        worth = f"{least:.2f} to {most:.2f}" if most > 1.001 * least else f"{most:.2f}"
        worth += ", E inside" if said["experts_in_law"] else ""
        multiplier = _ranged(said["compute_multiplier"], low, high, 2) + (" CUT" if said["compute_multiplier_cut"] else "")
        yield f"  {law:<15}{loss:<24}{worth:<24}{multiplier:<20}{flag}".rstrip()
    for names in (tuple(STREAM_LAWS), ROUTED_LAWS):
        values = {name: row["factors"][name] for name in names}
        if any(abs(ends[1] - 1) > 1e-6 for ends in values.values()):  # of axes that the design has
            yield "  " + "; ".join(_factor(name, ends, row["out_of_range"].get(name)) for name, ends in values.items())
    if row["K"] > 1:
        yield f"  {_factor('a_K', row['a_K'], row['out_of_range'].get(row['a_K_fit']))}"
    if row["leverage"]:
        said = row["leverage"]
        flag = f" (OUT OF RANGE: {', '.join(said['out_of_range'])})" if said["out_of_range"] else ""
        yield f"  {said['law']}: the experts alone C_dense/C {said['compute_multiplier']:.2f}{flag}"


def _ranged(value: float, low: float, high: float, digits: int) -> str:
    """A number with its interval; without one where nothing is known of it."""
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low < high else " [?]")


def _factor(name: str, ends: list[float], outside: list[str] | None) -> str:
    low, value, high = ends
    interval = f" [{low:.2f}, {high:.2f}]" if low != high else ""
    return f"{name} {value:.2f}{interval}{' (OUT OF RANGE: ' + ', '.join(outside) + ')' if outside else ''}"


def _axes_lines(facts: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "axis  best design of each value       score/best  why"
    for row in facts["axes"]:
        label = f"{row['axis']}={row['value']}"
        if row["best"] is None:
            yield f"{label:<6}{'-':<31}{'':>10}  {row['why']}"
        else:
            yield f"{label:<6}{row['best']:<31}{row['score_over_best']:>10.2f}  {row['why']}"
    if facts["break_even_a_K"]:
        pays = facts["break_even_a_K"]
        (low, high), (least, most) = pays["by_flops"], pays["by_time"]
        yield f"K=2 costs few FLOPs: it pays from a_K = {low:.5f} to {high:.5f} on, by law"
        longer = f"{pays['longer'] - 1:.1%} longer by the plan for {facts['device']}"
        yield f"    by time ({longer}, without messages and optimizer): from {least:.4f} to {most:.4f} on"


def _closing(facts: dict[str, Any]) -> Iterator[str]:
    ranges = facts["disagreement"]["ranges"]
    yield ""
    said = [f"N {format_count(ranges['N'][0])} to {format_count(ranges['N'][1])}"]
    said.append(f"D/N {ranges['tokens_per_parameter'][0]:.0f} to {ranges['tokens_per_parameter'][1]:.0f}")
    said += [f"{axis} {ranges[axis][0]:.0f} to {ranges[axis][1]:.0f}" for axis in AXES]
    yield f"the laws' own choices: {', '.join(said)}"
    for name, design in facts["disagreement"]["choice"].items():
        yield f"  {name:<14} {design}"
    yield "intervals"
    yield "  [?] above: no interval is published. The others span the factors' laws and what is said here; no form's own error"
    groups: dict[str, list[str]] = {}
    for law in facts["laws"]:
        groups.setdefault(law["interval"], []).append(law["law"])
    for interval, names in groups.items():
        yield f"  {', '.join(names)}: {interval}"
    yield "caveats"
    for caveat in facts["caveats"]:
        yield f"  {caveat}"
