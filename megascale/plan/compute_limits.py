"""What would follow if only compute counted (arXiv 2404.19484): its two predictions for a budget, beside the laws that deny them.

(a) Equal N D means equal quality, so the smallest N is the best one to serve; there is no interior optimum, and a limit must bind.
(b) Where the data are used up only N can grow; beside it stands what streams, experts, blocks and repetition offer.
N parameters, D training tokens, U unique tokens, C training FLOPs. Sizes are shapes with exactly counted FLOPs, so N D varies a little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megascale.config.errors import InputError
from megascale.laws.registry import law_named
from megascale.observe.console import format_count
from megascale.plan.axis_candidates import Axes, Candidate, Table, Workload, candidate, dense_table, table_of
from megascale.plan.axis_search import Limits, refuse_senseless
from megascale.plan.cluster import Cluster
from megascale.plan.hypothesis import REPETITION, Factor, Sizes, routed_factors, stream_factors
from megascale.plan.shapes import STEP, shape

GIB = 2**30
LAW = "compute-only"
DENYING = ("chinchilla", "besiroglu")
EPOCHS = (4.0, 16.0)
_SHOWN = 7
_EQUAL = 1.005


def compute_only_report(
    flops: float, device: Cluster, limits: Limits, axes: Axes | None = None, work: Workload | None = None, draws: int = 100
) -> dict[str, Any]:
    """Both predictions in plain values.

    Args:
        draws: refits for the interval of the streams' worth; 0 = none.

    Raises:
        InputError: a budget or limit that is no positive number, or limits that no shape keeps with as many tokens as parameters.
    """
    refuse_senseless(flops, limits)
    axes, work = axes or Axes(), work or Workload()
    dense = dense_table(work, device)
    tokens = flops / dense.train
    small = (tokens >= dense.sizes.parameters) & (dense.memory <= limits.memory)
    if not small.any():
        reason = f"no dense shape of {flops:.3g} FLOPs fits {limits.memory / GIB:.3g} GiB with as many tokens as parameters"
        raise InputError("--memory", reason, "raise the limit or the budget")
    if not _kept(dense, tokens, limits).any():
        fastest = float(dense.latency[small].min())
        reason = f"no dense shape that fits the memory needs only {limits.latency * 1e3:.3g} ms a token"
        raise InputError("--latency", reason, f"the fastest needs {fastest * 1e3:.3g} ms; raise it, or use a faster device")
    return {
        "law": LAW,
        "notes": list(law_named(LAW).notes),
        "flops": flops,
        "unique": float(limits.unique) if np.isfinite(limits.unique) else None,
        "memory": limits.memory,
        "equal_quality": _equal_quality(dense, tokens, limits),
        "binds": _binding(dense, tokens, limits),
        "capped": _capped(flops, dense, tokens, limits, axes, work, device, draws) if np.isfinite(limits.unique) else None,
    }


def _kept(dense: Table, tokens: np.ndarray, limits: Limits) -> np.ndarray:
    """Shapes that deployment allows and that the budget trains on as many tokens as parameters."""
    trained = tokens >= dense.sizes.parameters
    return np.asarray(trained & (dense.memory <= limits.memory) & (dense.latency <= limits.latency))


def _point(n: float, d: float) -> dict[str, np.ndarray]:
    return {"N": np.asarray([n]), "D": np.asarray([d])}


def _equal_quality(dense: Table, tokens: np.ndarray, limits: Limits) -> list[dict[str, Any]]:
    """Prediction (a): shapes of one budget, and what the laws say of each."""
    order = np.argsort(dense.sizes.parameters)
    trained = order[(tokens >= dense.sizes.parameters)[order] & (dense.sizes.parameters[order] >= 1e8)]
    picked = trained[np.unique(np.linspace(0, len(trained) - 1, _SHOWN).round().astype(int))]
    rows = []
    for index in picked:
        n, d = float(dense.sizes.parameters[index]), float(tokens[index])
        law = law_named(LAW)
        rows.append({
            "name": f"{dense.models[index].model.width}x{dense.models[index].model.layers}",
            "N": n, "D": d, "ND": n * d, "tokens_per_parameter": d / n,
            "bits_per_character": float(law.predict("bits_per_character", _point(n, d))[0]),
            "serving_flops_per_token": float(dense.serve[index]),
            "memory_bytes": float(dense.memory[index]),
            "over": _over(dense, tokens, int(index), limits),
            "out_of_range": list(law.outside(_point(n, d))),
            "compute_share": {name: float(law_named(name).predict("compute_share", _point(n, d))[0]) for name in DENYING},
        })  # fmt: skip
    return rows


def _over(dense: Table, tokens: np.ndarray, index: int, limits: Limits) -> list[str]:
    over = ["memory"] if dense.memory[index] > limits.memory else []
    over += ["latency"] if dense.latency[index] > limits.latency else []
    return over + (["unique tokens"] if tokens[index] > limits.unique else [])


def _binding(dense: Table, tokens: np.ndarray, limits: Limits) -> dict[str, Any]:
    """Which limit stops N from shrinking: the data; without a limit of them, the range of the law."""
    n = dense.sizes.parameters
    if np.isfinite(limits.unique):
        allowed = tokens <= limits.unique
        place, what = "data", f"the smallest N that {format_count(limits.unique)} unique tokens allow"
    else:
        variables = law_named(LAW).variables
        allowed = (tokens / n <= variables["D/N"].high) & (n >= variables["N"].low)
        place, what = "range of the law", "no limit of tokens is given: the smallest N for which the law was seen to hold"
    inside = allowed & _kept(dense, tokens, limits)
    if not inside.any():
        deployed = allowed & (dense.memory <= limits.memory) & (dense.latency <= limits.latency)
        against, than = ("the budget", "has as many tokens") if deployed.any() else ("deployment", "fits")
        why = f"no size keeps both: the data ask for a larger N than {than}"
        return {"limit": f"{place}, against {against}", "why": why, "N": None}
    index = int(np.flatnonzero(inside)[np.argmin(n[inside])])
    return {"limit": place, "why": what, "N": float(n[index]), "D": float(tokens[index])}


def _capped(
    flops: float, dense: Table, tokens: np.ndarray, limits: Limits, axes: Axes, work: Workload, device: Cluster, draws: int
) -> dict[str, Any]:
    """Prediction (b): N must grow. Beside it, what the other axes multiply N D by at the largest dense shape that fits."""
    n, law = dense.sizes.parameters, law_named(LAW)
    fits = _kept(dense, tokens, limits)
    here = int(np.flatnonzero(fits)[np.argmax(n[fits])])
    spent = min(float(tokens[here]), limits.unique)
    # The law counts C = 6 N D; the product that the budget buys is taken at this shape's counted FLOPs.
    product = float(n[here] * tokens[here])
    bits = float(law.predict("bits_per_character", _point(float(n[here]), float(tokens[here])))[0])
    needed = float(law.predict("needed_parameters", {"BPC": np.asarray([bits]), "D": np.asarray([spent])})[0])
    return {
        "reached_by": {"name": dense.models[here].name, "N": float(n[here]), "D": spent},
        "needed_parameters": needed,
        "gap": product / (float(n[here]) * spent),
        "bits_per_character": bits,
        "reachable_by": {name: _needed(name, flops, spent) for name in DENYING},
        "offers": list(_offers(dense.models[here], spent, limits, axes, work, device, draws)),
    }


def _needed(name: str, flops: float, tokens: float) -> float | None:
    """N with which a law of both terms reaches, on so many tokens, the loss of its own optimum for C; none = no N does."""
    law = law_named(name)
    target = float(law.predict("optimal_loss", {"C": np.asarray([flops])})[0])
    of_n = target - law.values["E"] - law.values["B"] * tokens ** -law.values["beta"]
    return float((law.values["A"] / of_n) ** (1 / law.values["alpha"])) if of_n > 0 else None


def _offers(
    plain: Candidate, tokens: float, limits: Limits, axes: Axes, work: Workload, device: Cluster, draws: int
) -> Iterator[dict[str, Any]]:
    """What each axis multiplies N D by, at most, and what it costs beside the dense shape."""
    step = plain.model.width // STEP

    def grown(**change: int) -> tuple[Sizes, str, Candidate]:
        model = shape(step, plain.model.layers // step, vocabulary=work.vocabulary, **change)
        one = candidate(model, work, device)
        cost = f"{one.train / plain.train:.2f} times the FLOPs, {one.memory / plain.memory:.2f} times the memory"
        return table_of([one]).sizes, cost, one

    def offer(axis: str, ends: tuple[float, float], cost: str, one: Candidate) -> dict[str, Any]:
        over = [name for name in ("memory", "latency") if getattr(one, name) > getattr(limits, name)]
        sizes = {"memory_bytes": one.memory, "latency_seconds": one.latency}
        return {"axis": axis, "low": ends[0], "high": ends[1], "cost": cost, **sizes, "over": over}

    streams, experts, blocks = max(axes.streams), max(axes.experts), max(axes.blocks)
    if streams > 1:
        sizes, cost, one = grown(streams=streams)
        yield offer(f"P={streams}", _merge(stream_factors(sizes, draws)), cost, one)
    if experts > 1:
        sizes, cost, one = grown(experts=experts)
        yield offer(f"E={experts}", _merge(routed_factors(sizes)), cost, one)
    if blocks > 1:
        _, cost, one = grown(blocks=blocks)
        yield offer(f"K={blocks}", (1.0, 1.0), f"{cost}; a_K = 1 until fitted to runs", one)
    law = law_named(REPETITION)
    for epochs in EPOCHS:
        inputs = {"D": np.asarray([epochs * tokens]), "U": np.asarray([tokens])}
        worth = float(law.predict("effective_tokens_ratio", inputs)[0]) * epochs
        yield offer(f"{epochs:.0f} epochs", (worth, worth), f"{epochs:.2f} times the FLOPs ({REPETITION})", plain)


def _merge(factors: list[Factor]) -> tuple[float, float]:
    return min(float(factor.low[0]) for factor in factors), max(float(factor.high[0]) for factor in factors)


def compute_only_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    yield f"if only compute counted (arXiv 2404.19484): {facts['flops']:.3g} FLOPs, {facts['memory'] / GIB:.3g} GiB"
    yield "(a) equal N D, equal quality: no interior optimum, the smallest N serves cheapest"
    yield f"{'shape':<12}{'N':>7}{'D':>8}{'D/N':>8}{'bits':>7}{'GFLOP/served':>14}{'GiB':>7}  compute not wasted by " + ", ".join(
        DENYING
    )
    for row in facts["equal_quality"]:
        shares = ", ".join(f"{row['compute_share'][name]:.0%}" for name in DENYING)
        notes = [f"over the {name}" for name in row["over"]]
        notes += [f"OUT OF RANGE: {', '.join(row['out_of_range'])}"] if row["out_of_range"] else []
        yield (
            f"{row['name']:<12}{format_count(row['N']):>7}{format_count(row['D']):>8}{row['tokens_per_parameter']:>8.1f}"
            f"{row['bits_per_character']:>7.3f}{row['serving_flops_per_token'] / 1e9:>14.1f}{row['memory_bytes'] / GIB:>7.1f}"
            f"  {shares:<11} {'; '.join(notes)}".rstrip()
        )
    binds = facts["binds"]
    size = f": N {format_count(binds['N'])}, D {format_count(binds['D'])}" if binds["N"] else ""
    yield f"    binds: {binds['limit']}{size} ({binds['why']})"
    if facts["capped"] is None:
        yield "(b) needs a limit of unique tokens"
        return
    yield from _capped_lines(facts["capped"])


def _capped_lines(capped: dict[str, Any]) -> Iterator[str]:
    base = capped["reached_by"]
    needed = f"N must be {format_count(capped['needed_parameters'])} for {capped['bits_per_character']:.3f} bits"
    yield f"(b) with {format_count(base['D'])} tokens: {needed}"
    lacks = (
        f"lacks a factor {capped['gap']:.2f} of N D" if capped["gap"] > _EQUAL else "lacks nothing: it uses up the budget first"
    )
    yield f"    the largest dense shape that fits, {base['name']}, {lacks}"
    for name, needed in capped["reachable_by"].items():
        said = f"N {format_count(needed)}" if needed else "no N: the term of D alone is larger"
        yield f"    {name}: the loss of its optimum for this budget, on these tokens, needs {said}"
    for offer in capped["offers"]:
        ends = f"{offer['low']:.2f}" + (f" to {offer['high']:.2f}" if offer["high"] > offer["low"] * 1.001 else "")
        over = "".join(f"; over the {name}" for name in offer["over"])
        enough = _enough(offer, capped["gap"])
        yield f"    {offer['axis']:<10} N D x {ends:<14} {enough:<16} {offer['cost']}{over}"


def _enough(offer: dict[str, Any], gap: float) -> str:
    if gap <= _EQUAL:
        return "not needed"
    return "closes the gap" if offer["low"] >= gap else "may close it" if offer["high"] >= gap else "too little"
