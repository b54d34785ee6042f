"""The search over axes: for a budget and limits at inference, which N, D, P, E, k and K the laws prefer, and how far they disagree.

N parameters a token passes, D tokens, P streams, E experts, k per token, K blocks. One design is dominated by another
that needs no more memory and no more time at inference and has no larger loss by any law. Designs are ranked by the compute multiplier
C_dense/C: FLOPs that the best dense shape with fresh tokens needs for the loss, over the budget, by the same law; its median over the laws
is the score, so that no single law decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megascale.config.errors import InputError
from megascale.laws.form import Array
from megascale.plan.axis_candidates import Axes, Table, Workload, candidates, dense_table
from megascale.plan.cluster import Cluster
from megascale.plan.hypothesis import Base, Effective, Sizes, bases, effective, loss_range, routed_factors, stream_factors
from megascale.plan.own_fits import Own

_CURVE = np.logspace(-3, 3, 181)
"""budgets, relative, at which the best dense loss is known"""
_EDGE = 1 + 1e-9
BINDS = 1.02
"""a limit binds when twice of it is worth this much compute"""
REASONS = ("memory", "latency", "budget", "fits")


@dataclass(frozen=True)
class Limits:
    """What deployment and data allow."""

    memory: float
    """bytes at inference"""
    latency: float = np.inf
    """seconds of a new token at batch 1"""
    unique: float = np.inf
    """training tokens that differ; more are repetitions"""
    served: float = 0.0
    """tokens served, which the FLOPs pay for too"""


@dataclass(frozen=True)
class Judged:
    """What one law says of all candidates."""

    base: Base
    ratio: Effective
    """N_eff/N"""
    loss: Array
    low: Array
    high: Array
    multiplier: Array
    """C_dense/C at the middle, and at the ends"""
    multiplier_low: Array
    multiplier_high: Array


@dataclass(frozen=True)
class AxisSearch:
    """Candidates, what the laws say, and what is left."""

    flops: float
    device: Cluster
    limits: Limits
    work: Workload
    axes: Axes
    own: Own
    table: Table
    tokens: Array
    judged: tuple[Judged, ...]
    fits: NDArray[np.bool_]
    reason: NDArray[np.str_]
    """why it is left out: memory, latency, budget; or fits"""
    front: NDArray[np.intp]
    dominator: NDArray[np.intp]
    """a design that dominates; -1 = none, or left out before"""
    gains: Mapping[str, float]
    """limit -> compute that twice of it is worth, as a factor of the score"""

    @property
    def score(self) -> Array:
        """Median of the compute multiplier over the laws."""
        return score(self.judged)

    @property
    def cut(self) -> NDArray[np.bool_]:
        """Laws by designs: whether the multiplier, or an end of its interval, lies beyond the budgets of the dense curve."""
        ends = [np.stack([one.multiplier, one.multiplier_low, one.multiplier_high]) for one in self.judged]
        beyond = [(values <= _CURVE[0] * _EDGE) | (values >= _CURVE[-1] / _EDGE) for values in ends]
        return np.stack([values.any(axis=0) for values in beyond])

    def best(self, chosen: NDArray[np.bool_] | None = None) -> int | None:
        """The design of the highest score among those that fit."""
        mask = self.fits if chosen is None else self.fits & chosen
        return int(np.flatnonzero(mask)[np.nanargmax(self.score[mask])]) if mask.any() else None

    @property
    def binds(self) -> list[str]:
        """The limits whose relaxation pays, beside the budget, most first."""
        names = sorted((name for name in self.gains if name != "flops"), key=lambda name: -self.gains[name])
        return [name for name in names if self.gains[name] >= BINDS]


def score(judged: tuple[Judged, ...]) -> Array:
    """Median of the compute multiplier over the laws."""
    return np.exp(np.median([np.log(one.multiplier) for one in judged], axis=0))


def search_axes(
    flops: float,
    device: Cluster,
    limits: Limits,
    axes: Axes | None = None,
    work: Workload | None = None,
    own: Own | None = None,
    draws: int = 100,
) -> AxisSearch:
    """Compare all candidates.

    Args:
        flops: of training, and of serving `limits.served` tokens.
        own: fits of one's own runs; none: published laws only, a_K = 1.
        draws: refits for the intervals that can be had; 0 = none.

    Raises:
        InputError: a budget or limit that is no positive number, a budget that trains no shape or cannot pay for serving, limits that
            nothing fits.
    """
    axes, work, own = axes or Axes(), work or Workload(), own or Own()
    refuse_senseless(flops, limits)
    dense = dense_table(work, device)
    table, tokens, judged = compare(flops, device, limits, axes, work, own, draws)
    reason = why_left_out(table, tokens, limits)
    fits = reason == "fits"
    if not fits.any():
        raise _nothing_fits(table, tokens, limits)
    objectives = np.stack([table.memory, table.latency, *(one.loss for one in judged)], axis=1)
    dominator = _dominators(objectives, fits)
    front = np.flatnonzero(fits & (dominator < 0))
    gains = _gains(flops, limits, table, judged, dense)
    return AxisSearch(flops, device, limits, work, axes, own, table, tokens, judged, fits, reason, front, dominator, gains)


def compare(
    flops: float, device: Cluster, limits: Limits, axes: Axes, work: Workload, own: Own, draws: int
) -> tuple[Table, Array, tuple[Judged, ...]]:
    """All candidates of a budget, their training tokens, and what each law says of them.

    Raises:
        InputError: the budget trains none of the shapes, or every one with more tokens than any law knows.
    """
    dense = dense_table(work, device)
    table = candidates(flops, limits.memory, axes, work, device, dense)
    tokens = _tokens(flops, table, limits)
    ratios = effective_ratios(table.sizes, own, draws)
    judged = (_judge(base, ratios[base.name], table, dense, flops, tokens, limits.unique) for base in (*bases(draws), *own.bases))
    return table, tokens, tuple(judged)


def effective_ratios(sizes: Sizes, own: Own, draws: int) -> dict[str, Effective]:
    """Law of N and D -> N_eff/N of some models; laws that know experts get the other factors alone."""
    streams, routed, worth = stream_factors(sizes, draws), routed_factors(sizes), own.worth(sizes.blocks)
    every = (*bases(draws), *own.bases)
    return {base.name: effective(streams, () if base.knows_experts else routed, worth) for base in every}


def refuse_senseless(flops: float, limits: Limits) -> None:
    """InputError for a budget, FLOPs, or a limit that is no positive number."""
    for option, value, low in (
        ("--flops", flops, 0.0), ("--memory", limits.memory, 0.0), ("--latency", limits.latency, 0.0), ("--unique", limits.unique, 0.0),
    ):  # fmt: skip
        if not value > low or (option in ("--flops", "--memory") and not np.isfinite(value)):
            raise InputError(option, f"{value:g} is no positive number", "give for example --flops 1e22 --memory 24GiB")
    if not 0 <= limits.served < np.inf:
        raise InputError("--served", f"{limits.served:g} is no number of tokens", "give for example 1e12, or leave it out")


def _tokens(flops: float, table: Table, limits: Limits) -> Array:
    """D of each candidate: what serving leaves, over the FLOPs of a training token."""
    return np.maximum(flops - limits.served * table.serve, 0.0) / table.train


def _judge(base: Base, ratio: Effective, table: Table, dense: Table, flops: float, tokens: Array, unique: float) -> Judged:
    enough = np.maximum(tokens, 1.0)
    middle, low, high = loss_range(base, table.sizes, ratio, enough, unique)
    budgets, losses = dense_curve(base, dense, flops)
    multiplier, least, most = (_budget_for(loss, budgets, losses) / flops for loss in (middle, high, low))
    return Judged(base, ratio, middle, low, high, multiplier, least, most)


def dense_curve(base: Base, dense: Table, flops: float) -> tuple[Array, Array]:
    """Budgets, and the loss of the best dense shape with fresh tokens at each."""
    budgets = flops * _CURVE
    ones = np.ones(len(dense))
    losses = [float(base.loss(dense.sizes.parameters, budget / dense.train, ones, np.inf).min()) for budget in budgets]
    return budgets, np.array(losses)


def _budget_for(loss: Array, budgets: Array, losses: Array) -> Array:
    """The dense budget for a loss; the curve's ends where it lies beyond them."""
    return np.exp(np.interp(-loss, -losses, np.log(budgets)))


def why_left_out(table: Table, tokens: Array, limits: Limits) -> NDArray[np.str_]:
    """One of `REASONS` for each candidate."""
    reason = np.full(len(table), "fits", dtype="<U8")
    reason[table.latency > limits.latency] = "latency"
    reason[table.memory > limits.memory] = "memory"
    reason[tokens < table.sizes.parameters] = "budget"
    return reason


def _nothing_fits(table: Table, tokens: Array, limits: Limits) -> InputError:
    trained = tokens >= table.sizes.parameters
    if not trained.any():
        reason = f"serving {limits.served:.3g} tokens leaves no design as many training tokens as parameters"
        return InputError("--served", reason, "raise --flops, or serve fewer tokens")
    small = trained & (table.memory <= limits.memory)
    if not small.any():
        least = float(table.memory[trained].min())
        name = table.models[int(np.flatnonzero(trained)[np.argmin(table.memory[trained])])].name
        reason = f"{limits.memory / 2**30:.3g} GiB hold no design that the budget trains sensibly"
        return InputError(
            "--memory", reason, f"the smallest, {name}, needs {least / 2**30:.3g} GiB; or lower --context or --flops"
        )
    fastest = float(table.latency[small].min())
    reason = f"no design that fits the memory needs only {limits.latency * 1e3:.3g} ms a token"
    return InputError("--latency", reason, f"the fastest needs {fastest * 1e3:.3g} ms; raise it, or use a faster device")


def _dominators(objectives: Array, fits: NDArray[np.bool_]) -> NDArray[np.intp]:
    """For each design one that is as good in all objectives and better in one; -1 where there is none."""
    found = np.full(len(objectives), -1)
    index = np.flatnonzero(fits)
    points = objectives[index]
    for place, point in zip(index, points, strict=True):
        better = np.all(points <= point, axis=1) & np.any(points < point, axis=1)
        if better.any():
            found[place] = index[np.flatnonzero(better)[np.argmin(points[better, 2:].sum(axis=1))]]
    return found


def _gains(flops: float, limits: Limits, table: Table, judged: tuple[Judged, ...], dense: Table) -> dict[str, float]:
    """What twice of each limit is worth in compute: the best score then over the best score now."""

    def best(budget: float, allowed: Limits) -> float:
        tokens = _tokens(budget, table, allowed)
        fits = why_left_out(table, tokens, allowed) == "fits"
        again = tuple(_judge(one.base, one.ratio, table, dense, flops, tokens, allowed.unique) for one in _without_draws(judged))
        return float(np.max(score(again)[fits]))

    now = best(flops, limits)
    relaxed = {"flops": best(2 * flops, limits) / now}
    for name in ("memory", "latency", "unique"):
        if np.isfinite(getattr(limits, name)):
            relaxed[name] = best(flops, replace(limits, **{name: 2 * getattr(limits, name)})) / now
    if limits.served:
        relaxed["served"] = best(flops, replace(limits, served=limits.served / 2)) / now
    return relaxed


def _without_draws(judged: tuple[Judged, ...]) -> list[Judged]:
    return [replace(one, base=replace(one.base, draws=())) for one in judged]
