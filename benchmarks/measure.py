"""Interleaved timing, peak memory, functions on ranks, tables and result files."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import pickle
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

RESULTS = Path(__file__).parent / "results"


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Run the variants in turn, `rounds` times each after one warm-up; best and median seconds of each.

    Neighbours on the machine slow all variants alike, so compare only figures of one call.
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"best_s": min(s), "median_s": statistics.median(s)} for name, s in seconds.items()}


L2_BYTES = 256 * 2**20
"""Written between two measurements on a GPU: more than any second-level cache."""


Result = TypeVar("Result")


def attempt(run: Callable[[], Result]) -> tuple[Result | None, str]:
    """What it returns, or none and why it fails, in words: one form or model that this machine cannot run loses no other. Frees what it
    leaves.
    """
    try:
        return run(), ""
    except Exception as error:  # noqa: BLE001, forms of other libraries fail in every way
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}".split("\n")[0][:200]
    finally:
        free()


def free() -> None:
    """Give back the memory of what nobody refers to; compiled modules refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _working(variants: Mapping[str, Callable[[], object]]) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Those that run, and the names of the others. Each is run once."""
    failed = [name for name, run in variants.items() if attempt(run)[1]]
    return {name: run for name, run in variants.items() if name not in failed}, failed


def _on_gpu(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3):
        for run in variants.values():
            run()
    for _ in range(rounds):
        for name, run in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(device: torch.device, variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each variant, run in turn: on a GPU the median, with nothing of it in the second-level cache; on a CPU, which others may use
    meanwhile, the best. Not a number for one that fails; it prints why.
    """
    runs, failed = _working(variants)
    if device.type == "cuda":
        times = _on_gpu(runs, rounds)
    else:
        times = {name: 1e3 * seconds["best_s"] for name, seconds in interleaved(runs, rounds).items()}
    return times | dict.fromkeys(failed, math.nan)


def peak_allocated_mib(device: torch.device, run: Callable[[], object]) -> float | None:
    """What a run allocates at most beside what is there before; only a GPU's allocator tells."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def form_rows(
    device: torch.device,
    case: str,
    runs: Mapping[str, Callable[[], object]],
    times: Mapping[str, float],
    floor_ms: float,
    floor: Mapping[str, float],
    rival: tuple[str, float] | None = None,
) -> list[dict[str, Any]]:
    """A kernel's table for one case: each form with its time, what a rival's and the floor are of it, and its peak memory.

    Args:
        case: the shape, in words.
        runs: the forms, "ours" among them.
        times: milliseconds of each form.
        floor_ms: which no form can beat.
        floor: what has to be done in that time, by unit: GB, TFLOP.
        rival: what forms are compared with, in words, and its milliseconds; none = the best other than ours, or ours where it is alone.

    A form that failed, whose time is not a number, has a row that says so.
    """
    others = (times[form] for form in runs if form != "ours" and not math.isnan(times[form]))
    words, rival_ms = rival or ("best other", min(others, default=times["ours"]))
    return [
        {"case": case, "form": form, "ms": "failed"}
        if math.isnan(times[form])
        else {
            "case": case,
            "form": form,
            "ms": times[form],
            f"{words} / this": rival_ms / times[form],
            "floor ms": floor_ms,
            "share of floor": floor_ms / times[form],
            **{f"floor {unit}": amount for unit, amount in floor.items()},
            "peak MiB": peak_allocated_mib(device, run),
        }
        for form, run in runs.items()
    ]


def _high_water_mark_mib() -> float:
    """Peak resident size of this process. Not ru_maxrss, which starts from the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def _peak_in_child(function: Callable[..., None], arguments: tuple, queue: Any) -> None:
    before = _high_water_mark_mib()
    function(*arguments)
    queue.put(_high_water_mark_mib() - before)


def peak_memory_mib(function: Callable[..., None], *arguments: object) -> float:
    """Growth of the peak resident size (MiB) while a fresh process runs the function (its imports are not counted)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_in_child, args=(function, arguments, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _rank(rank: int, function: Callable[..., object], size: int, folder: str, arguments: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine's name may lead elsewhere
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    (Path(folder) / f"rank-{rank}").write_bytes(pickle.dumps(function(rank, size, *arguments)))
    dist.destroy_process_group()


def on_ranks(function: Callable[..., Any], size: int, *arguments: object) -> list[Any]:
    """Call ``function(rank, size, *arguments)`` on fresh gloo ranks of this machine, one thread each; the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (function, size, folder, arguments), nprocs=size)
        return [pickle.loads((Path(folder) / f"rank-{rank}").read_bytes()) for rank in range(size)]  # noqa: S301, just written


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows as aligned text; what a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[f"{v:.3f}" if isinstance(v := row.get(name, ""), float) else str(v) for name in names] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))
    print()


def write_result(name: str, words: Sequence[str], table: object) -> Path:
    """Store a table with what it was measured on, and by which words behind `python -m benchmarks`."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    record = {
        "command": " ".join(["python -m benchmarks", *words]),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads",
        "table": table,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
