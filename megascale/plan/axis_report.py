"""The search over axes as plain values, and as lines for people. Every result carries the hypothesis it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megascale.laws.registry import law_named
from megascale.observe.console import format_count
from megascale.plan.axis_search import REASONS, AxisSearch
from megascale.plan.hypothesis import (
    CAVEATS,
    HYPOTHESIS,
    ROUTED_LAWS,
    STREAM_LAWS,
    out_of_range,
    routed_factors,
    stream_factors,
)
from megascale.plan.inference import Request, memory

GIB = 2**30
LADDER = (2, 4, 8)
"""the best design within the memory limit over each of these is shown too"""
_AXES = {"P": "streams", "E": "experts", "k": "per_token", "K": "blocks"}
_EQUAL = 1.005
"""scores within this factor are not told apart"""


def axis_report(found: AxisSearch, draws: int = 100) -> dict[str, Any]:
    """Everything in plain values: FLOPs, bytes, seconds, nats.

    Args:
        draws: as given to the search; the factors of the shown designs are computed again.
    """
    shown = _chosen(found)
    rows = [{"roles": roles, **_row(found, index, draws)} for index, roles in shown.items()]
    return {
        "hypothesis": list(HYPOTHESIS),
        "caveats": [*CAVEATS, *_own_caveats(found)],
        "budget": {"flops": found.flops, "served_tokens": found.limits.served, "stream_share": found.axes.stream_share},
        "limits": {name: _finite(getattr(found.limits, name)) for name in ("memory", "latency", "unique")},
        "workload": vars(found.work),
        "device": found.device.name,
        "laws": _laws(found),
        "candidates": {"tried": len(found.table), **{name: int((found.reason == name).sum()) for name in REASONS}},
        "front": [_short(found, int(index)) for index in found.front],
        "dominated": int((found.dominator >= 0).sum()),
        "binds": found.binds,
        "worth_of_twice": dict(found.gains),
        "designs": rows,
        "axes": list(_axis_values(found)),
        "disagreement": _disagreement(found),
        "break_even_a_K": found.break_even,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _own_caveats(found: AxisSearch) -> list[str]:
    said = ["latency is a bound by bytes and FLOPs at batch 1: launches of kernels and the router's work are left out"]
    if found.axes.stream_share < 1:
        said.append(
            f"streams in {found.axes.stream_share:.0%} of the tokens are taken to be worth what they are in all of them: "
            "one published run (arXiv 2505.10475, section 4.1) suggests it, no law says so"
        )
    return said


def _laws(found: AxisSearch) -> list[dict[str, Any]]:
    said = [
        {
            "law": one.base.name,
            "for": "L(N, D)",
            "source": one.base.law.source if one.base.law else "chinchilla form, fitted here",
            "interval": one.base.interval,
        }
        for one in found.judged
    ]
    one = found.table.sizes.at(0)
    for axis, factors in (("P", stream_factors(one, 0)), ("E", routed_factors(one))):
        for factor in factors:
            interval = factor.interval if axis == "E" else "bootstrap over its 24 losses"
            said.append({"law": factor.law, "for": axis, "source": law_named(factor.law).source, "interval": interval})
    return said


def _chosen(found: AxisSearch) -> dict[int, list[str]]:
    """Designs to show, with why."""
    chosen: dict[int, list[str]] = {}

    def add(index: int | None, role: str) -> None:
        if index is not None:
            chosen.setdefault(index, []).append(role)

    add(found.best(), "best score")
    for one in found.judged:
        add(_best_by(found, one.loss), f"best by {one.base.name}")
    for part in LADDER:
        add(found.best(found.table.memory <= found.limits.memory / part), f"best in 1/{part} of the memory")
    return chosen


def _best_by(found: AxisSearch, loss: np.ndarray) -> int:
    return int(np.flatnonzero(found.fits)[np.argmin(loss[found.fits])])


def _short(found: AxisSearch, index: int) -> dict[str, Any]:
    one, tokens = found.table.models[index], float(found.tokens[index])
    model = one.model
    return {
        "name": one.name,
        "N": one.active,
        "parameters": one.total,
        "D": tokens,
        "tokens_per_parameter": tokens / one.active,
        "P": model.streams.count,
        "E": model.experts.count,
        "k": model.experts.per_token,
        "K": model.altup.blocks,
        "training_flops": one.train * tokens,
        "serving_flops": one.serve * found.limits.served,
        "memory_bytes": one.memory,
        "latency_seconds": one.latency,
        "score": float(found.score[index]),
        "loss": {judged.base.name: float(judged.loss[index]) for judged in found.judged},
    }


def _row(found: AxisSearch, index: int, draws: int) -> dict[str, Any]:
    one, sizes, tokens = found.table.models[index], found.table.sizes.at(index), float(found.tokens[index])
    by_law: dict[str, dict[str, Any]] = {}
    outside: dict[str, list[str]] = {}
    for judged in found.judged:
        ratio = judged.ratio
        by_law[judged.base.name] = {
            "loss": float(judged.loss[index]),
            "low": float(judged.low[index]),
            "high": float(judged.high[index]),
            "N_eff/N": [float(ratio.low[index]), float(ratio.middle[index]), float(ratio.high[index])],
            "compute_multiplier": float(judged.multiplier[index]),
            "compute_multiplier_range": [float(judged.multiplier_low[index]), float(judged.multiplier_high[index])],
        }
        outside |= out_of_range(sizes, judged.base, float(ratio.middle[index]), tokens)
    parts = memory(one.model, Request(found.work.context, 0))
    factors = [*stream_factors(sizes, draws), *routed_factors(sizes)]
    return {
        **_short(found, index),
        "model": one.model.model_dump(),
        "prefill_seconds": one.prefill,
        "memory_parts": vars(parts),
        "by_law": by_law,
        "factors": {factor.law: [float(factor.low[0]), float(factor.value[0]), float(factor.high[0])] for factor in factors},
        "out_of_range": outside,
        "leverage": _leverage(found, index),
    }


def _leverage(found: AxisSearch, index: int) -> dict[str, Any] | None:
    """Compute multiplier of the experts by the law of Ling, which knows no N_eff."""
    model = found.table.models[index].model
    experts = model.experts
    if experts.count == 1:
        return None
    assert experts.width
    share, granularity = experts.per_token / experts.count, 2 * model.width / experts.width
    inputs = {"A": np.asarray([share]), "G": np.asarray([granularity]), "C": np.asarray([found.flops])}
    law = law_named("ling-leverage")
    return {
        "law": law.name,
        "compute_multiplier": float(law.predict("compute_multiplier", inputs)[0]),
        "out_of_range": list(law.outside(inputs)),
    }


def _axis_values(found: AxisSearch) -> Iterator[dict[str, Any]]:
    """For each value of each axis its best design, and why it is not chosen."""
    best = found.best()
    assert best is not None
    for symbol, field in _AXES.items():
        column = getattr(found.table.sizes, field)
        for value in sorted({int(value) for value in column}):
            mask = column == value
            mine = found.best(mask)
            if mine is None:
                counts = {name: int((found.reason[mask] == name).sum()) for name in REASONS if name != "fits"}
                yield {"axis": symbol, "value": value, "best": None, "why": "none fits: " + _counted(counts)}
                continue
            better = [one.base.name for one in found.judged if one.multiplier[mine] > one.multiplier[best] * _EQUAL]
            dominator = int(found.dominator[mine])
            yield {
                "axis": symbol,
                "value": value,
                "best": found.table.models[mine].name,
                "score_over_best": float(found.score[mine] / found.score[best]),
                "N": found.table.models[mine].active,
                "D": float(found.tokens[mine]),
                "memory_bytes": found.table.models[mine].memory,
                "latency_seconds": found.table.models[mine].latency,
                "better_by": better,
                "dominated_by": found.table.models[dominator].name if dominator >= 0 else None,
                "why": _why(found, mine, best, better),
            }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} over the {name}" for name, count in counts.items() if count)


def _why(found: AxisSearch, mine: int, best: int, better: list[str]) -> str:
    if mine == best:
        return "chosen"
    lower = f"better by {', '.join(better)}" if better else "worse by every law"
    dominator = int(found.dominator[mine])
    if dominator >= 0:
        return f"{lower}; dominated by {found.table.models[dominator].name}"
    one, other = found.table.models[mine], found.table.models[best]
    saved = [name for name in ("memory", "latency") if getattr(one, name) < 0.99 * getattr(other, name)]
    return lower + (f"; less {' and '.join(saved)}" if saved else "")


def _disagreement(found: AxisSearch) -> dict[str, Any]:
    """What the laws choose, each by itself."""
    chosen = {one.base.name: _best_by(found, one.loss) for one in found.judged}
    designs = {name: _short(found, index) for name, index in chosen.items()}
    ranges: dict[str, list[float]] = {}
    for key in ("N", "D", "tokens_per_parameter", "P", "E", "k", "K"):
        values = [float(design[key]) for design in designs.values()]
        ranges[key] = [min(values), max(values)]
    return {"choice": {name: design["name"] for name, design in designs.items()}, "ranges": ranges}


# Text ---------------------------------------------------------------------------------------------------------------------


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
    yield f"binds       {binds}; worth of twice the limit in compute{half}: {worth}"


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
    yield f"  {'law':<15}{'loss':<24}{'N_eff/N':<14}C_dense/C"
    for law, said in row["by_law"].items():
        flag = f"OUT OF RANGE: {', '.join(row['out_of_range'][law])}" if law in row["out_of_range"] else ""
        low, high = said["compute_multiplier_range"]
        least, _, most = said["N_eff/N"]
        loss = _ranged(said["loss"], said["low"], said["high"], 3)
        worth = f"{least:.2f} to {most:.2f}" if most > 1.001 * least else f"{most:.2f}"
        multiplier = _ranged(said["compute_multiplier"], low, high, 2)
        yield f"  {law:<15}{loss:<24}{worth:<14}{multiplier:<20}{flag}".rstrip()
    for names in (tuple(STREAM_LAWS), ROUTED_LAWS):
        values = {name: row["factors"][name] for name in names}
        if any(ends[1] != 1 for ends in values.values()):
            yield "  " + "; ".join(_factor(name, ends, row["out_of_range"].get(name)) for name, ends in values.items())
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
        low, high = facts["break_even_a_K"]
        yield f"K=2 costs few FLOPs: it pays from a_K = {low:.5f} to {high:.5f} on, by law; its memory traffic is not counted"


def _closing(facts: dict[str, Any]) -> Iterator[str]:
    ranges = facts["disagreement"]["ranges"]
    yield ""
    said = [f"N {format_count(ranges['N'][0])} to {format_count(ranges['N'][1])}"]
    said.append(f"D/N {ranges['tokens_per_parameter'][0]:.0f} to {ranges['tokens_per_parameter'][1]:.0f}")
    said += [f"{axis} {ranges[axis][0]:.0f} to {ranges[axis][1]:.0f}" for axis in _AXES]
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
