"""What each axis of a layout costs: step times, bubbles of the pipeline schedules, bytes, and a slow link between two hosts.

`python -m benchmarks parallel [--part layouts bubble bytes hosts] [--steps 3] [--rate 200mbit]`. Parts:

- layouts: step time and CPU seconds of one model by layout on 1 to 8 gloo ranks. Runs are the command that users start. Where ranks share
  cores the step time says little, and CPU seconds of all ranks over those of one process tell what the layout adds.
- bubble: the share of a step in which pipeline ranks wait, by schedule, against its paper's formula. Compute is slept
  (`benchmarks.bubble`), so that more ranks than cores do not disturb each other.
- bytes: what a rank sends, by the dry run, the ledger and the network interface.
- hosts: step time before and after the link between two hosts is slowed down to `--rate`, with one axis across it.

The last two make two hosts of network namespaces, which needs root; else they are left out and the table says why.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.bubble import FORMULAS, SCHEDULES, many_slept_steps, row
from benchmarks.hosts import Hosts, HostsError
from benchmarks.layout_runs import ALL_AXES, CROSSING, LayoutRuns, layout_rows, slow_link_row
from benchmarks.measure import on_ranks, print_table, write_result
from benchmarks.traffic import counted, predicted, traffic_row

SLEEP = 0.016
"""Seconds of each part of a layer's work: much more than what a schedule costs itself, a few milliseconds a micro-batch."""
PIPELINES = {2: (4, 8), 4: (8, 16)}
"""Micro-batches by pipeline ranks. dualpipev needs two for each stage of a rank."""
Table = list[dict[str, object]] | dict[str, object]


def bubble_table(steps: int) -> Table:
    """Every schedule, by ranks and micro-batches."""
    rows = []
    for ranks, micro_batches in PIPELINES.items():
        cases = [(name, number) for number in micro_batches for name in SCHEDULES]
        by_rank = on_ranks(many_slept_steps, ranks, cases, SLEEP, steps)
        for i, (name, number) in enumerate(cases):
            rows.append(row(ranks, name, number, SLEEP, [steps_of_cases[i] for steps_of_cases in by_rank]))
    print("layers sleep instead of computing\n")
    print_table(rows)
    return {"rows": rows, "formulas": FORMULAS}


def layouts_table(steps: int) -> Table:
    """Both models in their layouts."""
    with tempfile.TemporaryDirectory() as folder:
        rows = layout_rows(LayoutRuns(Path(folder)), steps)
    print(
        f"one thread a rank; shared_cores: more ranks than the {os.cpu_count()} cores, so compare CPU seconds, not step times\n"
    )
    print_table(rows)
    return rows


def on_two_hosts(measure: Callable[[LayoutRuns, Hosts], list[dict[str, object]]]) -> Table:
    """A table that is measured on two hosts, or the reason why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            hosts = Hosts(2, Path(folder))
        except HostsError as error:
            print(f"skipped: {error}\n")
            return {"skipped": str(error)}
        try:
            rows = measure(LayoutRuns(Path(folder)), hosts)
        finally:
            hosts.close()
    print_table(rows)
    return rows


def bytes_table(steps: int) -> Table:
    """What rank 0 of two sends in a step."""

    def measure(runs: LayoutRuns, hosts: Hosts) -> list[dict[str, object]]:
        found = counted(runs, hosts, steps)
        return [traffic_row(layout, predicted(runs, ALL_AXES, layout), found[layout.name]) for layout in CROSSING]

    return on_two_hosts(measure)


def hosts_table(steps: int, rate: str) -> Table:
    """Step times of one rank on each of two hosts, by link."""

    def measure(runs: LayoutRuns, hosts: Hosts) -> list[dict[str, object]]:
        rows = []
        for layout in CROSSING:
            sent = sum(predicted(runs, ALL_AXES, layout).values())
            rows.append(slow_link_row(runs, hosts, layout, steps, rate, sent))
        return rows

    print(f"slow link: {rate} (token bucket, no added delay)\n")
    return on_two_hosts(measure)


def main(arguments: list[str]) -> None:
    """Measure the parts asked for, and store them: all of them as parallel.json, some as parallel-PART.json each."""
    parser = argparse.ArgumentParser("python -m benchmarks parallel", description=__doc__.split("\n", 1)[0])
    names = ("layouts", "bubble", "bytes", "hosts")
    parser.add_argument("--part", nargs="+", choices=names, default=names, help="what to measure; default: everything")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured, behind warm-up")
    parser.add_argument("--rate", default="200mbit", help="of the slow link, as tc writes it")
    options = parser.parse_args(arguments)
    measures: dict[str, Callable[[], Table]] = {
        "layouts": lambda: layouts_table(options.steps),
        "bubble": lambda: bubble_table(options.steps),
        "bytes": lambda: bytes_table(options.steps),
        "hosts": lambda: hosts_table(options.steps, options.rate),
    }
    tables: dict[str, Table] = {}
    for name in dict.fromkeys(options.part):
        begin = time.perf_counter()
        tables[name] = measures[name]()
        print(f"{name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
    words = ["parallel", *arguments]
    if set(tables) == set(names):
        print("stored in", write_result("parallel", words, tables))
    else:
        for name, table in tables.items():
            print("stored in", write_result(f"parallel-{name}", words, {name: table}))
