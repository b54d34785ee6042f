"""The console: a header when a run starts and one line a step, plain text that stays clean in log files."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from megascale.observe.metrics import Record

_ETA_WINDOW = 50
_WARNING = r"\b(nan|inf|skipped \d+)\b"


def format_count(count: float) -> str:
    """A count in at most six characters: 950, 1.2K, 8.2M, 15.0T."""
    for unit in ("", "K", "M", "B"):
        if round(count, 1 if unit else 0) < 1000:
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f}T"


def format_duration(seconds: float) -> str:
    """A duration as h:mm:ss, or with days from 100 hours on: 0:00:07, 13:05:00, 4d 05h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours // 24}d {hours % 24:02d}h" if hours >= 100 else f"{hours}:{minute:02d}:{second:02d}"


def format_header(
    run_name: str, run_folder: str, parameters: int, total_steps: int, tokens_per_step: int, world: int, device: str
) -> str:
    """The line that opens a run: its size, its length, its devices and where its files are."""
    length = f"{total_steps} steps of {format_count(tokens_per_step)} tokens"
    return f"run {run_name}: {format_count(parameters)} parameters, {length}, {world} x {device}, files in {run_folder}"


def format_line(record: Record, total_steps: int, eta_seconds: float | None) -> str:
    """One step as one line of stable columns; "-" where the record has no value.

    The learning rate is that of the record's first parameter group. Without perf/mfu (unknown device peak) the column
    shows TFLOP/s. Validation losses and skipped steps are appended when there are any.

    Args:
        record: metrics of the step; only `step` is required.
        total_steps: length of the run, steps.
        eta_seconds: estimated time left; None when unknown.
    """
    lr_name = next((name for name in record if name.startswith("optim/lr/")), "")
    if "perf/mfu" in record:
        speed = f"MFU {_number(record, 'perf/mfu', 5, '.1f', 100)}%"
    else:
        speed = f"TFLOP/s {_number(record, 'perf/tflops_per_gpu', 7, '.3f')}"
    memory_name = "memory/peak_gib" if "memory/peak_gib" in record else "memory/rss_gib"
    columns = [
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"tokens {_count(record, 'tokens')}",
        f"loss {_number(record, 'train/lm_loss', 8, '.4f')}",
        f"lr {_number(record, lr_name, 8, '.2e')}",
        f"grad {_number(record, 'train/grad_norm', 8, '.3f')}",
        f"tokens/s {_count(record, 'perf/tokens_per_second')}",
        speed,
        f"mem {_number(record, memory_name, 6, '.2f')} GiB",
        f"eta {'-' if eta_seconds is None else format_duration(eta_seconds):>8}",
    ]
    columns += [f"{name[:-5]} {_number(record, name, 6, '.4f')}" for name in _validation_losses(record)]
    if float(record.get("guard/skipped_steps", 0)) > 0:
        columns.append(f"skipped {record['guard/skipped_steps']}")
    return "  ".join(columns)


@contextmanager
def unread(stream: TextIO) -> Iterator[None]:
    """Whatever is printed after nobody reads the stream any more (its terminal closed, its pipe broke) is dropped: a run, and the
    checkpoint it saves on a hang-up, are worth more than their console.
    """
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # for what is still buffered, which would change the exit code at the end
        os.close(nowhere)


def show(line: str, stream: TextIO) -> None:
    """Prints a line at once, while somebody reads the stream."""
    with unread(stream):
        print(line, file=stream, flush=True)


class ConsoleSink:
    """Prints the line of every n-th step, of the last one and of every validation. For rank 0.

    The estimated time left follows the last 50 steps by wall clock, validations and checkpoints included. Colours
    appear on a terminal only; a log file gets plain text.
    """

    def __init__(self, total_steps: int, every: int, stream: TextIO = sys.stdout, clock: Callable[[], float] = time.monotonic):
        """Prints nothing yet.

        Args:
            total_steps: length of the run, steps.
            every: steps between lines.
            stream: where lines go.
            clock: seconds, monotonic.
        """
        self._total_steps, self._every, self._stream, self._clock = total_steps, every, stream, clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=_ETA_WINDOW + 1)

    def write(self, record: Record) -> None:
        """Prints the step when it is due."""
        step = int(record["step"])
        self._seen.append((step, self._clock()))
        if step % self._every == 0 or step == self._total_steps or _validation_losses(record):
            with unread(self._stream):
                self._print(format_line(record, self._total_steps, self._eta_seconds(record)))

    def close(self) -> None:
        """Nothing is pending: every line has been flushed."""

    def _eta_seconds(self, record: Record) -> float | None:
        (first_step, first_time), (step, now) = self._seen[0], self._seen[-1]
        if step > first_step:
            step_seconds = (now - first_time) / (step - first_step)
        elif "perf/step_seconds" in record:
            step_seconds = float(record["perf/step_seconds"])
        else:
            return None
        return (self._total_steps - step) * step_seconds

    def _print(self, line: str) -> None:
        if not self._stream.isatty():
            print(line, file=self._stream, flush=True)
            return
        from rich.console import Console
        from rich.text import Text

        text = Text(line)
        text.highlight_regex(r"\bloss +\S+", "bold")
        text.highlight_regex(r"\bval/\S+ +\S+", "bold green")
        text.highlight_regex(_WARNING, "bold red")
        Console(file=self._stream, soft_wrap=True).print(text)


def _validation_losses(record: Record) -> list[str]:
    return [name for name in record if name.startswith("val/") and name.endswith("/loss")]


def _number(record: Record, name: str, width: int, form: str, scale: float = 1.0) -> str:
    text = format(float(record[name]) * scale, form) if name in record else "-"
    return text.rjust(width)


def _count(record: Record, name: str) -> str:
    return (format_count(float(record[name])) if name in record else "-").rjust(6)
