"""The console line: exact text, stable columns, clean in files, an ETA that follows the clock."""

from __future__ import annotations

import io
import math
import os

from hypothesis import given
from hypothesis import strategies as st

from megascale.observe.console import ConsoleSink, format_count, format_duration, format_header, format_line, show

RECORD = {
    "step": 120,
    "tokens": 1_234_567,
    "train/lm_loss": 3.45678,
    "train/grad_norm": 0.98765,
    "optim/lr/matrices": 3e-4,
    "optim/lr/vectors": 1e-5,
    "perf/tokens_per_second": 45_600.0,
    "perf/tflops_per_gpu": 401.25,
    "perf/mfu": 0.4057,
    "memory/peak_gib": 71.238,
}


def test_a_step_on_a_known_device() -> None:
    assert format_line(RECORD, 1000, 754.0) == (
        "step  120/1000  tokens   1.2M  loss   3.4568  lr 3.00e-04  grad    0.988  tokens/s  45.6K  MFU  40.6%  "
        "mem  71.24 GiB  eta  0:12:34"
    )


def test_a_step_on_a_cpu_with_validation_and_a_skipped_step() -> None:
    record = {n: v for n, v in RECORD.items() if n not in ("perf/mfu", "memory/peak_gib")}
    record |= {"memory/rss_gib": 1.5, "perf/tflops_per_gpu": 0.0123, "train/grad_norm": math.nan}
    record |= {"val/stdlib/loss": 3.25, "val/stdlib/bits_per_byte": 1.5, "guard/skipped_steps": 1}
    assert format_line(record, 1000, None) == (
        "step  120/1000  tokens   1.2M  loss   3.4568  lr 3.00e-04  grad      nan  tokens/s  45.6K  TFLOP/s   0.012  "
        "mem   1.50 GiB  eta        -  val/stdlib 3.2500  skipped 1"
    )


@given(
    step=st.integers(1, 1000),
    tokens=st.integers(0, 10**15),
    loss=st.floats(0, 999),
    rate=st.floats(0, 1e12),
    mfu=st.floats(0, 0.99),
    eta=st.one_of(st.none(), st.floats(0, 8e6)),
    absent=st.sets(st.sampled_from(["tokens", "train/lm_loss", "perf/tokens_per_second", "train/grad_norm"])),
)
def test_columns_do_not_move(
    step: int, tokens: int, loss: float, rate: float, mfu: float, eta: float | None, absent: set[str]
) -> None:
    values = {"step": step, "tokens": tokens, "train/lm_loss": loss, "perf/tokens_per_second": rate, "perf/mfu": mfu}
    line = format_line({n: v for n, v in (RECORD | values).items() if n not in absent}, 1000, eta)
    assert len(line) == len(format_line(RECORD, 1000, 754.0))
    for label in ("tokens", "loss", "lr", "grad", "MFU", "mem", "eta"):
        assert line.index(f" {label} ") == format_line(RECORD, 1000, 754.0).index(f" {label} ")


@given(st.floats(0, 9.9e16))
def test_counts_are_short(count: float) -> None:
    assert len(format_count(count)) <= 8
    assert count >= 1e15 or len(format_count(count)) <= 6


def test_counts_and_durations() -> None:
    counts = [0, 999, 999.6, 1234, 999_949, 999_951, 8_200_000, 15e12]
    assert [format_count(n) for n in counts] == ["0", "999", "1.0K", "1.2K", "999.9K", "1.0M", "8.2M", "15.0T"]
    assert [format_duration(s) for s in (7, 3599.6, 47_100, 363_600)] == ["0:00:07", "1:00:00", "13:05:00", "4d 05h"]


def test_header() -> None:
    assert format_header("quick", "runs/quick", 3_400_000, 1000, 8192, 4, "NVIDIA H200") == (
        "run quick: 3.4M parameters, 1000 steps of 8.2K tokens, 4 x NVIDIA H200, files in runs/quick"
    )


def sink_lines(every: int, records: list[dict], seconds_per_step: float = 2.0) -> list[str]:
    stream, now = io.StringIO(), iter(range(1000))
    sink = ConsoleSink(10, every, stream, clock=lambda: next(now) * seconds_per_step)
    for record in records:
        sink.write(record)
    sink.close()
    return stream.getvalue().splitlines()


def test_lines_come_every_n_steps_at_the_end_and_with_validation() -> None:
    records: list[dict] = [{"step": s} for s in range(1, 11)]
    records[4]["val/a/loss"] = 2.0
    shown = [line.split("/")[0].split()[-1] for line in sink_lines(4, records)]
    assert shown == ["4", "5", "8", "10"]


def test_eta_follows_the_clock_and_starts_from_the_first_step() -> None:
    lines = sink_lines(1, [{"step": s, "perf/step_seconds": 5.0} for s in range(1, 11)])
    etas = [line.split("eta")[1].strip() for line in lines]
    assert etas[0] == "0:00:45"
    assert etas[1] == "0:00:16"
    assert etas[-1] == "0:00:00"


def test_colours_reach_a_terminal_and_never_a_file() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    ConsoleSink(10, 1, terminal).write(RECORD)
    assert format_line(RECORD, 10, None).split("loss")[0].strip() in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1
    assert all(c.isprintable() for line in sink_lines(1, [RECORD]) for c in line)


def test_lines_that_nobody_reads_any_more_are_dropped() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        sink = ConsoleSink(1000, 1, stream)
        os.close(reader)
        sink.write(RECORD)
        show("the end", stream)
