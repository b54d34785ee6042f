"""Training runs of one small model in many layouts, by the commands that users start, and their step times.

P streams, E experts of which a token takes two, K residual blocks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.hosts import Host, Hosts
from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2
"""Steps that are not counted: the first one also makes buffers, connections and the data's first batches."""
PORT = 29517
PLAIN = "plain"
ALL_AXES = "P=2 E=4 K=2"
MODELS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    ALL_AXES: (
        "model.streams={count: 2, prefix_tokens: 8}",
        "model.experts={count: 4, per_token: 2, width: 96}",
        "model.altup={blocks: 2}",
    ),
}
"""What makes each of them of the plain one."""
SETTINGS: dict[str, Any] = {
    "model": {"width": 64, "layers": 8, "heads": 4, "ffn_width": 192},
    "data": {"sequence_length": 64},
    "batch": {"sequences": 16, "micro_batches": 4},
    "schedule": {"warmup_steps": 0, "shape": "constant"},
    "compile": "off",
    "validation": {"every": 0},
    "checkpoint": {"every": 0},
    "observe": {"wandb": {"mode": "off"}, "console_every": 1000},
}


@dataclass(frozen=True)
class Layout:
    """A layout of a world of so many ranks; dp is what is left of it."""

    name: str
    ranks: int
    parallel: str
    """the setting"""


ONE = Layout("one process", 1, "{}")
TWO_RANKS = (
    Layout("dp 2, plain torch", 2, "{zero_stage: 0}"),
    Layout("dp 2, ZeRO 1", 2, "{zero_stage: 1}"),
    Layout("dp 2, ZeRO 2", 2, "{zero_stage: 2}"),
    Layout("dp 2, ZeRO 3", 2, "{zero_stage: 3}"),
    Layout("tp 2", 2, "{tp: 2, zero_stage: 0}"),
    Layout("cp 2, all_gather", 2, "{cp: 2, zero_stage: 0}"),
    Layout("cp 2, ulysses", 2, "{cp: 2, context: ulysses, zero_stage: 0}"),
    Layout("stream 2", 2, "{stream: 2, zero_stage: 0}"),
    Layout("ep 2", 2, "{ep: 2, zero_stage: 0}"),
    Layout("pp 2, 1f1b", 2, "{pp: 2}"),
    Layout("pp 2, interleaved", 2, "{pp: 2, schedule: interleaved, virtual_stages: 2}"),
    Layout("pp 2, zero_bubble", 2, "{pp: 2, schedule: zero_bubble}"),
    Layout("pp 2, zbv", 2, "{pp: 2, schedule: zbv}"),
    Layout("pp 2, dualpipev", 2, "{pp: 2, schedule: dualpipev}"),
)
"""Each axis by itself. Plain torch where ZeRO is not what is looked at, so that the axis alone differs."""
MORE_RANKS = (
    Layout("dp 4, ZeRO 1", 4, "{zero_stage: 1}"),
    Layout("tp 4", 4, "{tp: 4, zero_stage: 0}"),
    Layout("cp 4, all_gather", 4, "{cp: 4, zero_stage: 0}"),
    Layout("ep 4", 4, "{ep: 4, zero_stage: 0}"),
    Layout("pp 4, 1f1b", 4, "{pp: 4}"),
    Layout("pp 2 x dp 2 x tp 2, ZeRO 1", 8, "{pp: 2, tp: 2, zero_stage: 1}"),
)
OF_THE_PLAIN = ("dp 2, plain torch", "tp 2", "pp 2, 1f1b")
"""What is also measured with the plain model."""
CROSSING = tuple(
    layout
    for layout in TWO_RANKS
    if layout.name not in ("dp 2, ZeRO 2", "pp 2, interleaved", "pp 2, zero_bubble", "pp 2, zbv", "pp 2, dualpipev")
)
"""What is tried between two hosts: with the layouts left out as much travels as with ZeRO 1 and 1F1B, or (several stages a rank)
proportionally more."""


def overrides(model: str, layout: Layout) -> list[str]:
    """What makes the config that of this model in this layout."""
    return [*MODELS[model], f"parallel={layout.parallel}"]


class LayoutRuns:
    """A folder with a corpus, a config and the runs made of them."""

    def __init__(self, folder: Path):
        self.folder, self.config, self.count = folder, folder / "runs.yaml", 0
        corpus = folder / "corpus"
        prepare_corpus(corpus, PrepareRequest(SourceRequest(paths=(ROOT / "docs",)), vocab_size=512))
        settings = {**SETTINGS, "data": {**SETTINGS["data"], "sources": [{"path": str(corpus)}]}}
        self.config.write_text(yaml.safe_dump({**settings, "run": {"folder": str(folder / "runs")}}))

    def start(self, model: str, layout: Layout, steps: int, hosts: Sequence[Host] = ()) -> LayoutRun:
        """A run, running: on this machine, or one rank on each host."""
        self.count += 1
        name = f"run-{self.count}"
        program = ["launch/pretrain.py", "--config", str(self.config), *overrides(model, layout)]
        program += [f"run.name={name}", f"schedule.steps={steps}"]
        torchrun, log = ["-m", "torch.distributed.run"], self.folder / f"{name}.log"
        if hosts:
            torchrun += [f"--nnodes={len(hosts)}", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-id={name}"]
            commands = [[*torchrun, f"--rdzv-endpoint={hosts[0].name}:{PORT}", *program] for _ in hosts]
        else:
            local = [*torchrun, "--standalone", f"--nproc-per-node={layout.ranks}"]
            commands = [[*(local if layout.ranks > 1 else []), *program]]
        processes = [start(command, log, host) for command, host in zip(commands, hosts or (None,), strict=True)]
        return LayoutRun(f"{model}, {layout.name}", processes, self.folder / "runs" / name / "metrics.jsonl", log)


def start(program: Sequence[str], log: Path, host: Host | None = None, **variables: str) -> subprocess.Popen:
    """A Python program, running; its output is added to a file."""
    command = ["bash", "-c", 'exec "$0" "$@" >> "$LOG" 2>&1', sys.executable, *program]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LOG": str(log), **variables}
    if host is not None:
        return host.start(command, ROOT, environment, quiet=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)


@dataclass(frozen=True)
class LayoutRun:
    """A run under way."""

    name: str
    processes: Sequence[subprocess.Popen]
    metrics: Path
    log: Path

    def records(self) -> list[dict]:
        """Of the steps done so far."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, step: int) -> None:
        """Until this step is done.

        Raises:
            RuntimeError: the run ended before.
        """
        while len(self.records()) < step:
            if any(process.poll() is not None for process in self.processes) and len(self.records()) < step:
                self.fail()
            time.sleep(0.02)

    def finish(self) -> list[dict]:
        """The records of a run that ends well.

        Raises:
            RuntimeError: it did not.
        """
        if any(process.wait(timeout=600) for process in self.processes):
            self.fail()
        print(f"{self.name}: {seconds(self.records()):.3f} s", flush=True)
        return self.records()

    def fail(self) -> None:
        """End what runs, and say why."""
        for process in self.processes:
            process.kill()
        raise RuntimeError(f"{self.name}: the run failed\n{self.log.read_text()[-5000:]}")

    def cpu_seconds(self) -> float:
        """Of all ranks so far. They are the processes below the launcher, or the only one."""
        (launcher,) = (psutil.Process(process.pid) for process in self.processes)
        total = 0.0
        for process in launcher.children(recursive=True) or [launcher]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def seconds(records: Sequence[dict]) -> float:
    """The median step."""
    return statistics.median(record["perf/step_seconds"] for record in records)


def layout_row(runs: LayoutRuns, model: str, layout: Layout, steps: int) -> dict[str, object]:
    """Step time, and CPU seconds that all ranks together need for a step."""
    run = runs.start(model, layout, WARM_UP + steps + 1)
    run.wait_for(WARM_UP)
    before = run.cpu_seconds()
    run.wait_for(WARM_UP + steps)
    cpu = (run.cpu_seconds() - before) / steps  # the step behind is under way, so that the ranks are still there
    records = run.finish()
    return {
        "model": model,
        "ranks": layout.ranks,
        "layout": layout.name,
        "step_s": seconds(records[WARM_UP:-1]),
        "cpu_s": cpu,
        "shared_cores": layout.ranks > (os.cpu_count() or 1),
    }


def layout_rows(runs: LayoutRuns, steps: int) -> list[dict[str, object]]:
    """All layouts, each model beside its run in one process."""
    plain = [layout for layout in TWO_RANKS if layout.name in OF_THE_PLAIN]
    cases = {PLAIN: (ONE, *plain), ALL_AXES: (ONE, *TWO_RANKS, *MORE_RANKS)}
    return [row for model, layouts in cases.items() for row in over_one([layout_row(runs, model, it, steps) for it in layouts])]


def over_one(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The rows of one model with times and CPU seconds over those of the first, which is one process."""

    def ratio(row: dict[str, object], key: str) -> float:
        return float(str(row[key])) / float(str(rows[0][key]))

    return [{**row, "step_over_one": ratio(row, "step_s"), "cpu_over_one": ratio(row, "cpu_s")} for row in rows]


def slow_link_row(runs: LayoutRuns, hosts: Hosts, layout: Layout, steps: int, rate: str, sent: float) -> dict[str, object]:
    """Step times before and after the link between two hosts is slowed down in the middle of a run.

    Args:
        sent: bytes that a rank sends in a step.
    """
    run = runs.start(ALL_AXES, layout, WARM_UP + 2 * steps + 3, hosts.hosts)
    try:
        run.wait_for(WARM_UP + steps)
        hosts.limit(rate)
        mixed = len(run.records()) + 1  # the step that is under way now is neither
        records = run.finish()
    finally:
        hosts.limit(None)
    fast, slow = seconds(records[WARM_UP : WARM_UP + steps]), seconds(records[mixed:])
    expected = sent / bytes_a_second(rate)
    return {
        "layout": layout.name,
        "sent_mb": sent / 1e6,
        "fast_s": fast,
        "slow_s": slow,
        "added_s": slow - fast,
        "sent_over_rate_s": expected,
        "added_over_expected": (slow - fast) / expected,
    }


def bytes_a_second(rate: str) -> float:
    """Of a rate as tc writes it, in bits: 200mbit."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    unit = next(unit for unit in units if rate.endswith(unit))
    return float(rate.removesuffix(unit)) * units[unit] / 8
