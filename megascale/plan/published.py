"""The planner against published runs: every row of three tables, planned with the A100 cluster file, beside what was measured.

Five constants of that file were fitted, by least squares of log time, to the rows marked calibrated: the roof of large matrix products and
the size that reaches half of it, the bandwidth between nodes, the overlap, and the wait for the slowest replica. The other rows judge them.
Memory has no fitted constant.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from megascale.plan import megatron
from megascale.plan.cluster import Cluster, load_cluster
from megascale.plan.costs import median
from megascale.plan.megatron import Published

CLUSTER = "a100"
WEAK_SCALING = "SC21 table 1"
AGAINST_ZERO = "SC21 table 2"
RECOMPUTATION = "2205.05198 table 5"
ACTIVATIONS = "2205.05198 figures 1, 7"
TABLES = ("sc21_table1", "sc21_table2", "recomputation")
"""Files in plan/data."""
FITTED_MODELS = ("22B", "530B")
"""Rows of 2205.05198 whose times were used in the fit."""
LARGEST_UNEXPLAINED = 0.25
EXPLANATIONS: dict[tuple[str, str], str] = {}
"""(table, row) -> why its error is above `LARGEST_UNEXPLAINED`; no row needs one today."""


@dataclass(frozen=True)
class Check:
    """One published figure and the planner's."""

    table: str
    row: str
    kind: str
    """time (seconds of an iteration), or memory (GiB, or percent of the baseline)"""
    published: float
    planned: float
    fitted: bool
    """used to fit the constants"""

    @property
    def error(self) -> float:
        """Relative to the published figure; above 0: planned too long or too large."""
        return self.planned / self.published - 1

    @property
    def explanation(self) -> str | None:
        """Why the error is large, where it is."""
        return EXPLANATIONS.get((self.table, self.row))


@dataclass(frozen=True)
class Summary:
    """Errors of a part of the rows."""

    kind: str
    fitted: bool
    rows: int
    median: float
    worst: float
    unexplained: int
    """rows above `LARGEST_UNEXPLAINED` without an explanation"""


def checks(cluster: Cluster | None = None) -> list[Check]:
    """Every figure of the tables, in their order.

    Args:
        cluster: none = the shipped A100 file.
    """
    cluster = cluster or load_cluster(CLUSTER)
    return [*_weak_scaling(cluster), *_against_zero(cluster), *_recomputation(cluster)]


def summaries(found: list[Check]) -> list[Summary]:
    """Median and largest absolute error of time and memory, fitted and judged apart."""
    rows = []
    for kind, fitted in (("time", True), ("time", False), ("memory", False)):
        part = [check for check in found if (check.kind, check.fitted) == (kind, fitted)]
        errors = [abs(check.error) for check in part]
        unexplained = sum(abs(check.error) > LARGEST_UNEXPLAINED and check.explanation is None for check in part)
        rows.append(Summary(kind, fitted, len(part), median(errors), max(errors), unexplained))
    return rows


def read_rows(name: str) -> list[dict[str, str]]:
    """Rows of a file in plan/data, without its comments."""
    text = (files("megascale.plan") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def largest_run() -> int:
    """GPUs of the largest run of the tables."""
    return max(int(row["gpus"]) for name in TABLES for row in read_rows(name))


def _run(row: dict[str, str], **more: Any) -> Published:
    sizes: dict[str, Any] = {name: int(row[name]) for name in ("layers", "width", "heads", "gpus", "tp", "pp", "batch")}
    return Published(**sizes, **more)


def _seconds(run: Published, teraflops: str) -> float:
    return run.paper_flops / run.gpus / (float(teraflops) * 1e12)


def _weak_scaling(cluster: Cluster) -> Iterator[Check]:
    for row in read_rows("sc21_table1"):
        stages = megatron.fewest_stages(int(row["layers"]), int(row["pp"]))
        run = megatron.fastest_micro_batch(_run(row, interleave=stages), cluster)
        name = f"{row['parameters_b']}B on {row['gpus']}"
        planned = megatron.iteration_seconds(run, cluster)
        yield Check(WEAK_SCALING, name, "time", _seconds(run, row["teraflops"]), planned, True)


def _against_zero(cluster: Cluster) -> Iterator[Check]:
    for row in read_rows("sc21_table2"):
        zero = row["scheme"] == "zero3"
        stages = 1 if zero else megatron.fewest_stages(int(row["layers"]), int(row["pp"]))
        run = _run(row, interleave=stages, zero=zero, micro_batch=int(row["micro_batch"]))
        name = f"{row['parameters_b']}B on {row['gpus']}, {'ZeRO 3' if zero else 'tensor and pipeline'}"
        fitted = zero and row["parameters_b"] == "174.6"
        planned = megatron.iteration_seconds(run, cluster)
        yield Check(AGAINST_ZERO, name, "time", _seconds(run, row["teraflops"]), planned, fitted)


def _recomputation(cluster: Cluster) -> Iterator[Check]:
    for row in read_rows("recomputation"):
        full = _run(row, micro_batch=int(row["micro_batch"]), interleave=int(row["interleave"]))
        both = replace(full, recompute="selective", sequence_parallel=True)
        none = replace(full, recompute="none")
        for column, run in (("full", full), ("both", both)):
            planned, fitted = megatron.iteration_seconds(run, cluster), row["name"] in FITTED_MODELS
            yield Check(RECOMPUTATION, f"{row['name']}, {_way(column)}", "time", float(row[f"{column}_seconds"]), planned, fitted)
        sizes = {
            "state_gib": ("weights and optimizer", megatron.state_bytes(full)),
            "none_gib": ("activations, nothing recomputed", megatron.activation_bytes(none)),
            "both_gib": (f"activations, {_way('both')}", megatron.activation_bytes(both)),
        }
        for column, (what, size) in sizes.items():
            yield Check(ACTIVATIONS, f"{row['name']}, {what}", "memory", float(row[column]), megatron.gibibytes(size), False)
        ways = {
            "sequence": replace(none, sequence_parallel=True),
            "selective": replace(full, recompute="selective"),
            "both": both,
            "full": full,
        }
        for column, run in ways.items():
            share = 100 * megatron.bytes_share(run, none)
            yield Check(ACTIVATIONS, f"{row['name']}, {_way(column)}, %", "memory", float(row[f"{column}_percent"]), share, False)


def _way(column: str) -> str:
    return {
        "sequence": "sequence parallelism",
        "selective": "selective recomputation",
        "both": "sequence parallelism and selective recomputation",
        "full": "full recomputation",
    }[column]
