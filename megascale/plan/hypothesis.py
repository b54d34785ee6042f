"""One hypothesis of how the axes add up, from the published laws: what P streams, E experts and K blocks are worth in parameters.

N parameters that one token passes (embeddings included, k experts), D tokens, U unique tokens, P streams, E experts, k per token, K blocks.
Constants come from the registry of laws. Nobody has tested the product: single laws are known for P <= 8 at D = 42B, for E at D = 130B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import megascale
from megascale.laws.fit import FitOptions, fit
from megascale.laws.form import Array, Values
from megascale.laws.law import Law
from megascale.laws.registry import form_named, law_named
from megascale.laws.study import Box
from megascale.laws.table import RunTable, read_csv
from megascale.laws.uncertainty import Draws, bootstrap

HYPOTHESIS = (
    "N_eff = N (k ln P + 1) (Nbar(N,E)/N) a_K",
    "L = E0 + A/N_eff^alpha + B/D^beta",
)
CAVEATS = (
    "the product of the factors is a hypothesis: no published run has streams and experts together",
    "the factors are taken to hold at every D: they were measured at 42B tokens (streams) and at 130B (experts)",
    "Nbar/N is taken at E/k experts, where E = k is a dense model; the laws of equation 1 know k = 1 only",
    "training FLOPs are exact counts of each shape (model/accounting.py), not 6 N D",
    "losses of different laws are not comparable: corpora differ. Compare N_eff/N, the compute multiplier and the allocation",
)
STREAM_LAWS = {"parscale-stack": "stack-v2-python", "parscale-pile": "pile"}
"""law -> its runs among the shipped losses, which give its interval"""
ROUTED_LAWS = ("routed-s-base", "routed-rl-r", "routed-hash", "utilisation-s-base")
BASE_LAWS = ("chinchilla", "besiroglu", "muennighoff", "sardana", "joint-moe")
FITTED = "redpajama-fit"
"""the base law fitted here, which has an interval"""
REPETITION = "muennighoff"
NO_INTERVAL = "no interval published"
_DATA = Path(megascale.__file__).resolve().parent / "laws" / "data"
_TAIL = 2.5


@dataclass(frozen=True)
class Sizes:
    """What the laws must know of some models; arrays of one length."""

    parameters: Array
    """N"""
    non_embedding: Array
    """of them, what lies between embedding and head"""
    streams: Array
    experts: Array
    per_token: Array
    blocks: Array
    forward: Array
    """TFLOPs of a token of one stream"""
    utilisation: Array
    """B: all parameters without the embeddings over those FLOPs"""

    @property
    def expansion(self) -> Array:
        """E/k: by how much experts multiply the feed-forward's weights."""
        return self.experts / self.per_token

    def at(self, chosen: Array | NDArray[np.intp] | int) -> Sizes:
        """Some of the models."""
        index = np.atleast_1d(chosen)
        return Sizes(**{name: np.asarray(value)[index] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Factor:
    """What an axis multiplies N by, as one law has it."""

    law: str
    value: Array
    low: Array
    high: Array
    interval: str
    """where low and high come from"""


@dataclass(frozen=True)
class Effective:
    """N_eff over N, or one axis' part of it: the least, the middle (geometric) and the largest that the laws and their intervals allow."""

    low: Array
    middle: Array
    high: Array


@dataclass(frozen=True)
class Base:
    """L(N, D) of a law."""

    name: str
    corpus: str
    values: Values
    draws: tuple[Values, ...]
    """other constants that the runs allow, for intervals; none where nothing is published"""
    interval: str
    law: Law | None = None
    box: Box | None = None
    """least and largest inputs of the runs, for a law fitted here"""

    @property
    def knows_experts(self) -> bool:
        """Whether experts enter the law itself, instead of N_eff."""
        return self.name == "joint-moe"

    def loss(self, n: Array, d: Array, expansion: Array, unique: float, values: Values | None = None) -> Array:
        """Loss at effective parameters n and d tokens, of which so many are unique."""
        if self.name != REPETITION:
            d = d * repetition(d, unique)
        inputs = {"N": n, "D": d, "E": expansion, "U": np.minimum(d, unique)}
        with np.errstate(all="ignore"):
            if self.law is not None:
                return self.law.predict("loss", inputs, values or self.values)
            return form_named("chinchilla").evaluate(values or self.values, inputs)

    def outside(self, n: float, d: float, expansion: float, unique: float) -> list[str]:
        """The symbols in which this leaves the range of the law."""
        inputs = {name: np.asarray([value]) for name, value in (("N", n), ("D", d), ("E", expansion), ("U", min(d, unique)))}
        if self.law is not None:
            return list(self.law.outside(inputs))
        assert self.box is not None
        known = {symbol: float(inputs[symbol][0]) for symbol in self.box}
        return [symbol for symbol, (low, high) in self.box.items() if not low <= known[symbol] <= high]


def stream_factors(sizes: Sizes, draws: int = 100) -> list[Factor]:
    """k ln P + 1 by each corpus; the interval is a bootstrap over the published losses, 95 %."""
    found = []
    for name, corpus in STREAM_LAWS.items():
        value = law_named(name).predict("stream_parameters_ratio", {"P": sizes.streams})
        refits = _stream_draws(corpus, draws).values if draws else ()
        low, high = value, value
        if refits:
            all_k = np.array([values["k"] for values in refits])
            ends = np.percentile(all_k, [_TAIL, 100 - _TAIL])
            low, high = (end * np.log(sizes.streams) + 1 for end in ends)
        found.append(Factor(name, value, low, high, f"{draws} refits of its 24 losses" if refits else "not asked for"))
    return found


def routed_factors(sizes: Sizes) -> list[Factor]:
    """Nbar/N by each router, and by the form in FLOPs and utilisation, which knows k; none has a published interval."""
    found = []
    for name in ROUTED_LAWS:
        value = _by_utilisation(sizes) if name == "utilisation-s-base" else _by_experts(name, sizes)
        found.append(Factor(name, value, value, value, NO_INTERVAL))
    return found


def effective(streams: Sequence[Factor], routed: Sequence[Factor], blocks: Effective) -> Effective:
    """The product of the factors and of a_K (`blocks`); without routed ones for laws that know experts."""
    low, high = np.min([factor.low for factor in streams], axis=0), np.max([factor.high for factor in streams], axis=0)
    if routed:
        low = low * np.min([factor.low for factor in routed], axis=0)
        high = high * np.max([factor.high for factor in routed], axis=0)
    return Effective(low * blocks.low, np.sqrt(low * high) * blocks.middle, high * blocks.high)


def repetition(tokens: Array, unique: float) -> Array:
    """D'/D: worth of a token beside a fresh one, where D tokens are drawn from fewer unique ones (arXiv 2305.16264, equation 5)."""
    if not np.isfinite(unique):
        return np.ones_like(tokens)
    return law_named(REPETITION).predict("effective_tokens_ratio", {"D": tokens, "U": np.full_like(tokens, unique)})


def bases(draws: int = 100) -> list[Base]:
    """The laws of N and D: the published ones, and one fitted here to the shipped over-training runs, which has an interval."""
    found = []
    for name in BASE_LAWS:
        law = law_named(name)
        single = any(constant.note.startswith("standard error") for constant in law.constants.values())
        interval = "standard errors of single constants only" if single else NO_INTERVAL
        found.append(Base(name, law.corpus, law.values, (), interval, law))
    return [*found, _fitted(draws)]


def loss_range(base: Base, sizes: Sizes, ratio: Effective, tokens: Array, unique: float) -> tuple[Array, Array, Array]:
    """Loss at the middle of N_eff, and its ends: largest and smallest N_eff, and the law's own interval where it has one."""
    n, e = sizes.parameters, sizes.expansion
    middle = base.loss(n * ratio.middle, tokens, e, unique)
    low, high = base.loss(n * ratio.high, tokens, e, unique), base.loss(n * ratio.low, tokens, e, unique)
    if base.draws:
        best = np.array([base.loss(n * ratio.high, tokens, e, unique, values) for values in base.draws])
        worst = np.array([base.loss(n * ratio.low, tokens, e, unique, values) for values in base.draws])
        low, high = np.percentile(best, _TAIL, axis=0), np.percentile(worst, 100 - _TAIL, axis=0)
    return middle, low, high


def out_of_range(sizes: Sizes, base: Base, ratio: float, tokens: float, unique: float) -> dict[str, list[str]]:
    """Law -> symbols in which one model leaves its range; laws that say nothing of it (dense, one stream) are not asked."""
    assert len(sizes.parameters) == 1
    flags = {base.name: base.outside(float(sizes.parameters[0] * ratio), tokens, float(sizes.expansion[0]), unique)}
    inner = {"N": sizes.non_embedding, "P": sizes.streams, "E": sizes.expansion, "F": sizes.forward, "B": sizes.utilisation}
    asked: list[str] = [*STREAM_LAWS] if sizes.streams[0] > 1 else []
    if sizes.experts[0] > 1 and not base.knows_experts:
        asked += ROUTED_LAWS
    for name in asked:
        law = law_named(name)
        flags[name] = list(law.outside({symbol: inner[symbol] for symbol in law.given if symbol in inner}))
        if name.startswith("routed") and sizes.per_token[0] > 1:
            flags[name].append("k")
    return {name: symbols for name, symbols in flags.items() if symbols}


def _by_experts(name: str, sizes: Sizes) -> Array:
    return law_named(name).predict("routed_parameters_ratio", {"N": sizes.non_embedding, "E": sizes.expansion})


def _by_utilisation(sizes: Sizes) -> Array:
    """F_eff/F: FLOPs of the dense model with this loss. At one utilisation, log L is linear in log F: two points give the slope."""
    law = law_named("utilisation-s-base")
    dense = sizes.non_embedding / (sizes.forward * 1e12)

    def log_loss(forward: Array, utilisation: Array) -> Array:
        return np.log(law.predict("loss", {"F": forward, "B": utilisation}))

    here, more = log_loss(sizes.forward, dense), log_loss(10 * sizes.forward, dense)
    ratio = 10 ** ((log_loss(sizes.forward, sizes.utilisation) - here) / (more - here))
    return np.where(sizes.experts > 1, ratio, 1.0)


@lru_cache
def _stream_draws(corpus: str, draws: int) -> Draws:
    return _draws("parscale", read_csv(_DATA / "parscale_losses.csv", where={"corpus": (corpus,)}), draws)[1]


def _draws(form: str, table: RunTable, draws: int) -> tuple[Values, Draws]:
    found = fit(form_named(form), table, FitOptions(starts=8))
    return found.values, bootstrap(found, table, draws, seed=0)


@lru_cache
def _fitted(draws: int) -> Base:
    table = read_csv(_DATA / "overtraining_redpajama.csv")
    values, refits = _draws("chinchilla", table, draws)
    box = {symbol: (float(column.min()), float(column.max())) for symbol, column in table.inputs(("N", "D")).items()}
    kept = refits.values if draws else ()
    interval = f"{draws} refits of its {len(table)} runs" if kept else "not asked for"
    return Base(FITTED, "RedPajama (Paloma part), runs of arXiv 2403.08540", values, kept, interval, box=box)
