"""The registry of every metric a run may record: its name, unit, meaning and section.

A name pattern holds placeholders: `{layer}` is a layer index of two or more digits (`moe/layer_07/...`), `{p}` a
stream index, `{group}` a parameter group, `{source}` a corpus. A name outside the registry is a programming error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

Record = Mapping[str, "float | int | str"]
"""The metrics of one step by name."""


@dataclass(frozen=True)
class Metric:
    """One metric, or one family of metrics that differ by a placeholder."""

    name_pattern: str
    unit: str
    meaning: str
    section: str


METRICS: tuple[Metric, ...] = (
    Metric("lineage", "count", "how often this run had been started when the record was written, from 1", "progress"),
    Metric("step", "steps", "optimizer steps done, this one included", "progress"),
    Metric("phase", "index or name", "phase of the schedule", "progress"),
    Metric("tokens", "tokens", "loss tokens trained on since the start of the run", "progress"),
    Metric("flops_total", "FLOPs", "model FLOPs spent since the start of the run, forward and backward", "progress"),
    Metric("sequences", "sequences", "sequences consumed since the start of the run", "progress"),
    Metric("train/lm_loss", "nats per token", "language-model loss, mean over the loss tokens of the step", "loss"),
    Metric("train/total_loss", "nats per token", "language-model loss and weighted auxiliary losses", "loss"),
    Metric("train/aux/balance", "nats per token", "weighted load-balance loss of all routed layers", "routing"),
    Metric("train/aux/router_z", "nats per token", "weighted router z-loss of all routed layers", "routing"),
    Metric(
        "train/aux/entropy", "nats per token", "rl_r: weighted entropy of the policies of all routed layers, negative", "routing"
    ),
    Metric("train/aux/policy", "nats per token", "rl_r: weighted REINFORCE loss of all routed layers", "routing"),
    Metric(
        "train/aux/baseline", "nats per token", "rl_r: weighted squared error of the baselines of all routed layers", "routing"
    ),
    Metric("val/{source}/loss", "nats per token", "loss on the held-out documents of a source", "validation"),
    Metric("val/{source}/bits_per_byte", "bits per byte", "that loss per byte of text, for any tokenizer", "validation"),
    Metric("train/grad_norm", "norm", "global gradient norm before clipping", "optimizer"),
    Metric("optim/lr/{group}", "learning rate", "learning rate of a parameter group", "optimizer"),
    Metric("perf/step_seconds", "seconds", "wall time of the step", "throughput"),
    Metric("perf/data_seconds", "seconds", "part of the step spent waiting for data", "throughput"),
    Metric(
        "perf/checkpoint_seconds", "seconds", "how long steps have waited for checkpoints since the last record", "throughput"
    ),
    Metric("perf/tokens_per_second", "tokens/s", "loss tokens per second, all devices", "throughput"),
    Metric("perf/tokens_per_second_per_gpu", "tokens/s", "loss tokens per second and device", "throughput"),
    Metric("perf/tflops_per_gpu", "TFLOP/s", "model FLOPs per second and device", "throughput"),
    Metric("perf/mfu", "share of peak", "model FLOPs utilisation, attention counted where it is visible", "throughput"),
    Metric("perf/mfu_full", "share of peak", "the same with full attention counted, as Megatron and PaLM do", "throughput"),
    Metric("phase/loss_bump", "nats", "loss of a phase's first step minus the mean of the ten steps before it", "phases"),
    Metric(
        "phase/tokens_to_recover", "tokens", "loss tokens of a phase until the mean of ten steps is back at that mean", "phases"
    ),
    Metric(
        "perf/hfu",
        "share of peak",
        "hardware FLOPs utilisation: as perf/mfu, of what is computed, recomputation included",
        "throughput",
    ),
    Metric("memory/peak_gib", "GiB", "most device memory allocated during the step, largest over ranks", "memory"),
    Metric("memory/rss_gib", "GiB", "resident memory of the process, on runs without an accelerator", "memory"),
    Metric("moe/layer_{layer}/load_max_over_mean", "ratio", "tokens of the busiest expert over the mean; 1 is even", "routing"),
    Metric("moe/layer_{layer}/load_entropy", "share of maximum", "entropy of the loads over log E; 1 is even", "routing"),
    Metric("moe/layer_{layer}/idle_experts", "experts", "experts that received no token", "routing"),
    Metric("moe/layer_{layer}/dropped_share", "share", "choices beyond the capacity, dropped, of all choices", "routing"),
    Metric("moe/layer_{layer}/residual", "ratio", "s_base: largest relative column error of the Sinkhorn plan, mean", "routing"),
    Metric(
        "moe/layer_{layer}/policy_noise",
        "nats^2",
        "rl_r: mean squared norm of a token's policy gradient by the logits, its variance but for the squared mean",
        "routing",
    ),
    Metric("streams/aggregator_entropy", "share of maximum", "entropy of the stream weights over log P; 1 is even", "streams"),
    Metric(
        "streams/correlation", "cosine", "mean cosine between the final states of two streams; 1: they say the same", "streams"
    ),
    Metric("streams/weight_p{p}", "share", "mean weight the aggregator gives a stream", "streams"),
    Metric("altup/layer_{layer}/divergence", "ratio", "distance between the residual blocks, relative to their norm", "altup"),
    Metric(
        "altup/layer_{layer}/forward_gain",
        "gain",
        "largest absolute row sum of the product of the mixes up to this layer: by how much they may enlarge a block",
        "altup",
    ),
    Metric(
        "altup/layer_{layer}/backward_gain",
        "gain",
        "largest absolute column sum of the product of the mixes from this layer on: by how much they may enlarge a gradient",
        "altup",
    ),
    Metric("altup/gain", "gain", "mean correction gain g over the layers, blocks and tokens", "altup"),
    Metric("data/epoch/{source}", "epochs", "passes over a source so far", "data"),
    Metric("data/share/{source}", "share", "share of a source in the sequences so far", "data"),
    Metric("guard/skipped_steps", "steps", "steps skipped so far because the gradient was not finite", "guard"),
)

TIMING: frozenset[str] = frozenset(m.name_pattern for m in METRICS if m.section in ("throughput", "memory"))
"""Patterns of times, rates and memory: the metrics that may differ between a run and the same run resumed."""

_PLACEHOLDERS = {"layer": r"\d{2,}", "p": r"\d+", "group": r"[^/]+", "source": r"[^/]+"}


@cache
def name_regex(name_pattern: str) -> str:
    """The anchored regular expression of a name pattern: `moe/layer_{layer}/x` -> `^moe/layer_\\d{2,}/x$`."""
    literal_and_name = re.split(r"\{(\w+)\}", name_pattern)
    parts = (_PLACEHOLDERS[text] if i % 2 else text for i, text in enumerate(literal_and_name))
    return "^" + "".join(parts) + "$"


@cache
def metric_of(name: str) -> Metric:
    """The registered metric a logged name belongs to. Raises KeyError when there is none."""
    for metric in METRICS:
        if re.match(name_regex(metric.name_pattern), name):
            return metric
    raise KeyError(f"metric {name!r} is not in megascale.observe.metrics.METRICS")


def check_record(names: Iterable[str]) -> None:
    """Raises KeyError when a record (or any collection of names) holds a name that is not in the registry."""
    for name in names:
        metric_of(name)


def reproducible(record: Record) -> dict[str, float | int | str]:
    """The part of a record that is bit-identical after a resume: all but times, rates, memory and the lineage."""
    return {name: value for name, value in record.items() if name != "lineage" and metric_of(name).name_pattern not in TIMING}
