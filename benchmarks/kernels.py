"""The kernels, one table each, and the layer of experts made of them: ours, eager, compiled, public ones; floors, ratios, peak memory.

`python -m benchmarks kernels [--only NAME ...]`, `python -m benchmarks moe`. On a CPU the shapes are small and ours is the plain form:
the tables only show that they can be filled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import kernel_aggregate, kernel_altup, kernel_dispatch, kernel_loss, kernel_merge
from benchmarks.measure import attempt, print_table, write_result

Rows = Callable[[torch.device, bool], list[dict[str, Any]]]
KERNELS: dict[str, Rows] = {
    "dispatch": kernel_dispatch.rows,
    "aggregate": kernel_aggregate.rows,
    "altup": kernel_altup.rows,
    "merge": kernel_merge.rows,
    "loss": kernel_loss.rows,
}
LAYERS: dict[str, Rows] = {"moe": kernel_dispatch.layer_rows}


def _fill(command: str, tables: Mapping[str, Rows], arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(f"python -m benchmarks {command}", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(tables), default=list(tables))
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in given.only:
        print(name)
        rows, failure = attempt(partial(tables[name], device, device.type == "cpu"))
        found[name] = rows or [{"failed": failure}]
        print_table(found[name])
        path = write_result(f"{command}-{device.type}", [command, *arguments], found)  # after each, in case the time runs out
    print("stored in", path)
    if failed := [name for name, rows in found.items() if "failed" in rows[0]]:
        sys.exit(f"failed: {', '.join(failed)}")


def main(arguments: list[str]) -> None:
    """Fill the tables of the kernels."""
    _fill("kernels", KERNELS, arguments)


def moe(arguments: list[str]) -> None:
    """Fill the table of the layer."""
    _fill("moe", LAYERS, arguments)
