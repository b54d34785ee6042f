"""The search over axes as plain values. Every result carries the hypothesis it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from megascale.laws.registry import law_named
from megascale.plan.axis_candidates import Candidate, dense_table
from megascale.plan.axis_search import REASONS, AxisSearch
from megascale.plan.break_even import break_even
from megascale.plan.hypothesis import (
    CAVEATS,
    HYPOTHESIS,
    out_of_range,
    routed_factors,
    stream_factors,
)
from megascale.plan.inference import Request, memory

LADDER = (2, 4, 8)
"""the best design within the memory limit over each of these is shown too"""
AXES = {"P": "streams", "E": "experts", "k": "per_token", "K": "blocks"}
_EQUAL = 1.005
"""scores within this factor are not told apart"""


def axis_report(found: AxisSearch, draws: int = 100) -> dict[str, Any]:
    """Everything in plain values: FLOPs, bytes, seconds, nats.

    Args:
        draws: as given to the search; the factors of the shown designs are computed again.
    """
    shown = _chosen(found)
    grid = list(_grid_ends(found))
    rows = [{"roles": roles, **_row(found, index, draws)} for index, roles in shown.items()]
    return {
        "hypothesis": list(HYPOTHESIS),
        "caveats": [found.own.caveat, *CAVEATS, *_more_caveats(found), *grid],
        "grid_ends": grid,
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
        "break_even_a_K": None if (pays := break_even(found)) is None else asdict(pays),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _more_caveats(found: AxisSearch) -> list[str]:
    said = ["latency is a bound by bytes and FLOPs at batch 1: launches of kernels and the router's work are left out"]
    if found.axes.stream_share < 1:
        said.append(
            f"streams in {found.axes.stream_share:.0%} of the tokens are taken to be worth what they are in all of them: "
            "one published run (arXiv 2505.10475, section 4.1) suggests it, no law says so"
        )
    if found.own.bases:
        names = ", ".join(base.name for base in found.own.bases)
        said.append(f"{names}: N of the search includes embeddings; fit runs of yours with --map N=N_with_embeddings")
    return said


def _grid_ends(found: AxisSearch) -> Iterator[str]:
    """Where the shapes and budgets that are compared end before the answer does."""
    dense = dense_table(found.work, found.device)
    n, best = dense.sizes.parameters, found.best()
    assert best is not None
    fresh = found.flops / dense.train
    chosen = {one.base.name: int(np.argmin(one.base.loss(n, fresh, np.ones(len(dense)), np.inf))) for one in found.judged}
    for index, end in ((int(n.argmin()), "smallest"), (int(n.argmax()), "largest")):
        shape = _shape_name(dense.models[index])
        names = [name for name, one in chosen.items() if one == index]
        if names:
            reason = "C_dense/C and the worth of more FLOPs are too large: no dense model of another size is compared with"
            yield f"the best dense shape for the budget is the {end} there is, {shape}, by {', '.join(names)}: {reason}"
        if _shape_name(found.table.models[best]) == shape:
            yield f"the best design has the {end} shape there is, {shape}: one beyond it may be better"
    cut = found.cut[:, found.fits].sum(axis=1)
    counts = [f"{one.base.name} {count}" for one, count in zip(found.judged, cut, strict=True) if count]
    if counts:
        yield f"C_dense/C, or an end of its interval, is cut at 0.001 or 1000 of the budget; designs by law: {', '.join(counts)}"


def _shape_name(one: Candidate) -> str:
    return f"{one.model.width}x{one.model.layers}"


def _laws(found: AxisSearch) -> list[dict[str, Any]]:
    said = [
        {
            "law": one.base.name,
            "for": "L(N, D)",
            "source": one.base.law.source if one.base.law else f"chinchilla form, fitted to {one.base.corpus}",
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
    for judged, cut in zip(found.judged, found.cut[:, index], strict=True):
        ratio = judged.ratio
        by_law[judged.base.name] = {
            "loss": float(judged.loss[index]),
            "low": float(judged.low[index]),
            "high": float(judged.high[index]),
            "experts_in_law": judged.base.knows_experts and one.model.experts.count > 1,
            "N_eff/N": [float(ratio.low[index]), float(ratio.middle[index]), float(ratio.high[index])],
            "compute_multiplier": float(judged.multiplier[index]),
            "compute_multiplier_range": [float(judged.multiplier_low[index]), float(judged.multiplier_high[index])],
            "compute_multiplier_cut": bool(cut),
        }
        outside |= out_of_range(sizes, judged.base, float(ratio.middle[index]), tokens, found.limits.unique)
    outside |= found.own.outside(sizes)
    worth = found.own.worth(sizes.blocks)
    parts = memory(one.model, Request(found.work.context, 0))
    factors = [*stream_factors(sizes, draws), *routed_factors(sizes)]
    return {
        **_short(found, index),
        "model": one.model.model_dump(),
        "prefill_seconds": one.prefill,
        "memory_parts": vars(parts),
        "by_law": by_law,
        "factors": {factor.law: [float(factor.low[0]), float(factor.value[0]), float(factor.high[0])] for factor in factors},
        "a_K": [float(worth.low[0]), float(worth.middle[0]), float(worth.high[0])],
        "a_K_fit": found.own.name,
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
    for symbol, field in AXES.items():
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
