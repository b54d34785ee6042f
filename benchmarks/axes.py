"""What each axis gives at equal tokens in short trainings: held-out loss against the plain model's, in pairs of runs with the same seed.

`python -m benchmarks axes [--seeds 5] [--steps 200] [--corpus data/stdlib] [--jobs 2] [--folder runs/axes]`. A seed sets the weights that
the models share and the order of the samples, so a difference is the axis and not the luck of the draw. Runs this short show signs and
failures, not what an axis is worth at scale. Every run is the command that users start.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t as student

from benchmarks.measure import write_result

ROOT = Path(__file__).resolve().parent.parent
PLAIN: dict[str, Any] = {
    "model": {"width": 128, "layers": 4, "heads": 2, "ffn_width": 384, "qk_norm": True},
    "data": {"sequence_length": 128},
    "batch": {"sequences": 16},
    "optimizer": {"lr": 3e-3},
    "schedule": {"shape": "wsd", "final_lr": 0.0},
    "compile": "off",
    "validation": {"every": 0, "sequences": 128},
    "checkpoint": {"every": 0},
    "observe": {"wandb": {"mode": "off"}, "console_every": 1000},
}
ROUTERS = ("softmax", "sigmoid", "s_base", "rl_r", "hash")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "P=2": ("model.streams={count: 2, prefix_tokens: 16}",),
    **{f"E=8 {router}": (f"model.experts={{count: 8, width: 384, router: {router}}}",) for router in ROUTERS},
    "K=2": ("model.altup={blocks: 2}",),
    "P=2 E=8 K=2": (
        "model.streams={count: 2, prefix_tokens: 16}",
        "model.experts={count: 8, width: 384}",
        "model.altup={blocks: 2}",
    ),
}
HEALTH: dict[str, Callable[[list[float]], float]] = {"aggregator_entropy": min, "idle_experts": max, "divergence": min}
"""Metrics, by the end of their names, that say whether an axis is alive; which of several layers' and runs' values is the worst."""


def train(folder: Path, variant: str, seed: int, steps: int, corpus: str) -> dict[str, float]:
    """One run by the real command; the metrics behind its last step."""
    name = f"{variant.replace(' ', '-').replace('=', '')}-{seed}"
    command = [sys.executable, "launch/pretrain.py", "--config", str(folder / "plain.yaml"), *VARIANTS[variant]]
    command += [
        f"run={{name: {name}, seed: {seed}, folder: {folder}}}",
        f"schedule.steps={steps}",
        f"schedule.warmup_steps={steps // 10}",
        f"validation.every={steps}",
        f"data.sources=[{{path: {corpus}}}]",
    ]
    metrics = folder / name / "metrics.jsonl"
    if not metrics.exists() or json.loads(metrics.read_text().splitlines()[-1])["step"] < steps:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{variant}, seed {seed}: the run failed\n{done.stdout}{done.stderr}")
    last = metrics.read_text().splitlines()[-1]
    return {key: value for key, value in json.loads(last).items() if isinstance(value, (int, float))}


def held_out_loss(run: dict[str, float]) -> float:
    """Of a run's last metrics."""
    return next(value for key, value in run.items() if key.startswith("val/") and key.endswith("/loss"))


def row(runs: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    """Mean difference in held-out loss over pairs of runs, half its 95 % interval (Student), and whether the axis is alive."""
    loss = [held_out_loss(run) for run in runs]
    differences = [a - held_out_loss(b) for a, b in zip(loss, plain, strict=True)]
    count = len(differences)
    result = {"loss": statistics.mean(loss), "difference": statistics.mean(differences)}
    if count > 1:
        deviation = statistics.stdev(differences)
        result["plus_minus"] = float(student.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    result["flops_ratio"] = statistics.mean(a["flops_total"] / b["flops_total"] for a, b in zip(runs, plain, strict=True))
    for health, worst in HEALTH.items():
        values = [value for run in runs for key, value in run.items() if key.endswith(health)]
        if values:
            result[health] = worst(values)
    return result


def main(arguments: list[str]) -> None:
    """Train all pairs, print and store the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks axes", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="pairs of runs of each variant")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--corpus", default="data/stdlib", help="a prepared corpus")
    parser.add_argument(
        "--folder", type=Path, help="keep the runs here, and go on with those that are here; default: a temporary one"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plain.yaml").write_text(yaml.safe_dump(PLAIN))
        waiting = {
            variant: [
                pool.submit(train, folder, variant, seed, options.steps, options.corpus) for seed in range(1, options.seeds + 1)
            ]
            for variant in VARIANTS
        }
        runs = {variant: [future.result() for future in futures] for variant, futures in waiting.items()}
    table = {variant: row(found, runs["plain"]) for variant, found in runs.items()}
    print(f"{'':14}{'loss':>8}{'difference':>12}{'95 %':>9}{'FLOPs':>7}  health")
    for variant, cells in table.items():
        health = " ".join(f"{k}={cells[k]:.3g}" for k in HEALTH if k in cells)
        interval = f"{cells['plus_minus']:9.4f}" if "plus_minus" in cells else f"{'':9}"
        print(f"{variant:14}{cells['loss']:8.4f}{cells['difference']:+12.4f}{interval}{cells['flops_ratio']:7.2f}  {health}")
    print(write_result("axes", ["axes", *arguments], table))
