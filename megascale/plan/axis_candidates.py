"""The models that the search over axes compares: shapes of every size with streams, experts and blocks, and what each costs.

Parameters and FLOPs are exact counts of the config (`megascale.model.accounting`); memory and latency are those of generation on one device
(`megascale.plan.inference`), at batch 1 with a full context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from megascale.config.errors import InputError
from megascale.config.schema import Model
from megascale.laws.form import Array
from megascale.model import accounting
from megascale.plan.cluster import Cluster
from megascale.plan.hypothesis import Sizes
from megascale.plan.inference import FORWARD, Request, decode_seconds, forward_flops, memory, prefill_seconds
from megascale.plan.shapes import VOCABULARY, shape, shapes

LEAST_RATIO, MOST_RATIO = 1.0, 2e4
"""tokens a parameter between which dense shapes are looked at"""
DENSE = (1, 1, 1, 1)
"""P, E, k, K of a dense model"""
ROOM = 2.2
"""by how much models may exceed the memory limit and still be looked at: doubled limits are searched too"""


@dataclass(frozen=True)
class Axes:
    """Values of each axis to try."""

    streams: tuple[int, ...] = (1, 2, 4, 8)
    experts: tuple[int, ...] = (1, 8, 16, 32, 64, 128)
    per_token: tuple[int, ...] = (1, 2)
    blocks: tuple[int, ...] = (1, 2)
    stream_share: float = 1.0
    """share of the training tokens that have P streams; the others have one (arXiv 2505.10475, section 4.1: 0.02)"""

    def __post_init__(self) -> None:
        limits = {"streams": 64, "experts": 4096, "per_token": 64, "blocks": 8}
        for name, most in limits.items():
            values = getattr(self, name)
            if not values or any(not 1 <= value <= most for value in values):
                raise InputError(
                    f"--{name.replace('_', '-')}", f"{values} is not a list of 1 to {most}", "give for example 1,2,4"
                )
        if not 0 < self.stream_share <= 1:
            raise InputError("--stream-share", f"{self.stream_share:g} is no share of the tokens", "give for example 0.02")

    def combinations(self) -> Iterator[tuple[int, int, int, int]]:
        """P, E, k, K; k only where there are as many experts and more."""
        for streams in self.streams:
            for experts in self.experts:
                for per_token in self.per_token if experts > 1 else (1,):
                    if per_token < experts or experts == 1:
                        for blocks in self.blocks:
                            yield streams, experts, per_token, blocks


@dataclass(frozen=True)
class Workload:
    """How the models are trained and used."""

    sequence: int = 4096
    """tokens of a training sequence; a token sees half of it"""
    context: int = 4096
    """tokens of context at inference: for cache, latency and the FLOPs of serving"""
    vocabulary: int = VOCABULARY


@dataclass(frozen=True)
class Candidate:
    """One model and what it costs; units FLOPs, bytes, seconds."""

    model: Model
    total: int
    active: int
    """parameters that a token passes, embeddings included: N"""
    active_inner: int
    """of them without embedding and head"""
    inner: int
    """all without embedding and head"""
    train: float
    """FLOPs of a training token, all streams, mean over the tokens"""
    stream_forward: float
    """FLOPs of a token's forward pass in one stream, in training"""
    serve: float
    """FLOPs of a served token"""
    memory: float
    latency: float
    """of a new token at batch 1 and full context"""
    prefill: float
    """of a prompt as long as the context"""

    @property
    def name(self) -> str:
        """Shape and axes."""
        model = self.model
        return (
            f"{model.width}x{model.layers} P{model.streams.count} E{model.experts.count} "
            f"k{model.experts.per_token} K{model.altup.blocks}"
        )


@dataclass(frozen=True)
class Table:
    """Candidates and their numbers as arrays."""

    models: tuple[Candidate, ...]
    sizes: Sizes
    train: Array
    serve: Array
    memory: Array
    latency: Array

    def __len__(self) -> int:
        return len(self.models)


def candidate(model: Model, work: Workload, device: Cluster, stream_share: float = 1.0) -> Candidate:
    """A model with its costs; only a share of its training tokens may have all streams."""
    counts = accounting.parameters(model)
    active = accounting.active_parameters(model)
    keys = accounting.mean_visible_keys((work.sequence - 1) / 2, model)
    one = model.model_copy(update={"streams": model.streams.model_copy(update={"count": 1})})
    return Candidate(
        model,
        counts.total,
        active,
        active - counts.embedding - counts.head,
        counts.non_embedding,
        stream_share * accounting.flops_per_token(model, keys) + (1 - stream_share) * accounting.flops_per_token(one, keys),
        FORWARD * accounting.flops_per_token(one, keys),
        forward_flops(model, work.context),
        memory(model, Request(work.context, 0)).total,
        decode_seconds(model, device, work.context),
        prefill_seconds(model, device, work.context),
    )


@lru_cache(maxsize=2**14)
def shape_candidate(
    step: int, depth: int, axes: tuple[int, int, int, int], work: Workload, device: Cluster, stream_share: float = 1.0
) -> Candidate:
    """The candidate of a shape with P, E, k and K."""
    streams, experts, per_token, blocks = axes
    model = shape(step, depth, streams=streams, experts=experts, per_token=per_token, blocks=blocks, vocabulary=work.vocabulary)
    return candidate(model, work, device, stream_share)


def table_of(models: list[Candidate]) -> Table:
    """Candidates as arrays."""
    assert models

    def column(of: str) -> Array:
        return np.array([float(getattr(one, of)) for one in models])

    def axis(of: str, field: str) -> Array:
        return np.array([float(getattr(getattr(one.model, of), field)) for one in models])

    forward = column("stream_forward")
    sizes = Sizes(
        parameters=column("active"),
        non_embedding=column("active_inner"),
        streams=axis("streams", "count"),
        experts=axis("experts", "count"),
        per_token=axis("experts", "per_token"),
        blocks=axis("altup", "blocks"),
        forward=forward / 1e12,
        utilisation=column("inner") / forward,
    )
    assert all(len(getattr(sizes, field.name)) == len(models) for field in fields(sizes))
    return Table(tuple(models), sizes, column("train"), column("serve"), column("memory"), column("latency"))


def dense_table(work: Workload, device: Cluster) -> Table:
    """All dense shapes: what the compute multiplier compares with."""
    return table_of([shape_candidate(step, depth, DENSE, work, device) for step, depth in shapes()])


def candidates(flops: float, limit: float, axes: Axes, work: Workload, device: Cluster, dense: Table) -> Table:
    """All models that the budget and about the memory allow.

    Args:
        flops: of training.
        limit: bytes at inference.
        dense: all dense shapes.

    Raises:
        InputError: the budget trains none of the shapes.
    """
    ratio = flops / dense.train / dense.sizes.parameters
    if ratio.max() < LEAST_RATIO:
        need = float((dense.train * dense.sizes.parameters).min())
        reason = f"{flops:.3g} FLOPs give even the smallest shape fewer tokens than parameters"
        raise InputError("--flops", reason, f"give at least {need:.2g}")
    if ratio.min() > MOST_RATIO:
        most = MOST_RATIO * float((dense.train * dense.sizes.parameters).max())
        reason = f"{flops:.3g} FLOPs are {ratio.min():.3g} tokens a parameter of the largest shape"
        raise InputError("--flops", reason, f"no law reaches there; give at most {most:.2g}")
    found = []
    for (step, depth), one in zip(shapes(), ratio, strict=True):
        if not LEAST_RATIO <= one <= MOST_RATIO:
            continue
        allowed = (one for one in axes.combinations() if not _far_too_large(step, depth, one[1], limit))
        found += [shape_candidate(step, depth, one, work, device, axes.stream_share) for one in allowed]
    return table_of(found or [dense.models[int(np.argmax((ratio >= LEAST_RATIO) & (ratio <= MOST_RATIO)))]])


def _far_too_large(step: int, depth: int, experts: int, limit: float) -> bool:
    """Whether the weights of half the layers' experts alone exceed the limit by far."""
    width, layers = 512.0 * step, depth * step
    return 2 * 3 * 3.5 * width**2 * (layers // 2) * (1 + experts) > ROOM * limit
