"""metrics.jsonl: what is written comes back exactly, whatever killed the writer, and a resumed run reads as one run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config.errors import InputError
from megascale.observe.metrics import Record
from megascale.observe.sinks import FanOut, JsonlSink, next_lineage, read_metrics


def written(path: Path, lineage: int, *records: dict) -> Path:
    sink = JsonlSink(path, lineage)
    for record in records:
        sink.write(record)
    sink.close()
    return path


@given(loss=st.floats(), tokens=st.integers(0, 10**26))
def test_values_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, loss: float, tokens: int) -> None:
    path = written(tmp_path_factory.mktemp("m") / "metrics.jsonl", 1, {"step": 1, "train/lm_loss": loss, "tokens": tokens})
    (record,) = read_metrics(path)
    assert record["tokens"] == tokens
    assert record["train/lm_loss"].hex() == loss.hex() or (math.isnan(loss) and math.isnan(record["train/lm_loss"]))


def test_lines_are_valid_json_also_for_nan_and_infinity(tmp_path: Path) -> None:
    path = written(tmp_path / "m", 3, {"step": 1, "train/lm_loss": math.nan, "train/grad_norm": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    parsed = json.loads(path.read_text(), parse_constant=refuse)
    assert parsed == {"lineage": 3, "step": 1, "train/lm_loss": "nan", "train/grad_norm": "-inf"}


@given(data=st.data())
def test_a_file_cut_anywhere_keeps_its_complete_lines_and_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("m")
    path = written(folder / "metrics.jsonl", 1, *({"step": s, "train/lm_loss": 1 / s} for s in range(1, 6)))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    complete = content[:cut].count(b"\n")
    assert [r["step"] for r in read_metrics(path)] == list(range(1, complete + 1))
    written(path, 2, {"step": 6})
    assert [r["step"] for r in read_metrics(path)] == [*range(1, complete + 1), 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_each_start_raises_the_lineage_and_readers_keep_the_highest_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert next_lineage(path) == 1
    written(path, 1, *({"step": s, "train/lm_loss": 10.0 + s} for s in (1, 2, 3, 4)))
    assert next_lineage(path) == 2
    written(path, 2, {"step": 3, "train/lm_loss": 23.0})
    records = read_metrics(path)
    assert [(r["step"], r["lineage"], r["train/lm_loss"]) for r in records] == [
        (1, 1, 11.0),
        (2, 1, 12.0),
        (3, 2, 23.0),
        (4, 1, 14.0),
    ]
    assert next_lineage(path) == 3


def test_two_lines_of_one_step_are_merged(tmp_path: Path) -> None:
    path = written(tmp_path / "m", 1, {"step": 1, "train/lm_loss": 2.0}, {"step": 1, "val/a/loss": 3.0})
    assert read_metrics(path) == [{"step": 1, "lineage": 1, "train/lm_loss": 2.0, "val/a/loss": 3.0}]


def test_kill_9_loses_no_written_line(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from megascale.observe.sinks import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]), 1)\n"
        "for step in range(1, 51): sink.write({'step': step, 'train/lm_loss': 0.1 * step})\n"
        "print('written', flush=True); time.sleep(60)"
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 51))


@pytest.mark.parametrize("damage", [b"{not json}\n", b"[1]\n", b'{"step": 1}\n', b"\xff\xfe\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = written(tmp_path / "metrics.jsonl", 1, {"step": 1})
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no metrics file"):
        read_metrics(tmp_path / "metrics.jsonl")


class Recording:
    def __init__(self, fail: bool = False):
        self.records: list[dict] = []
        self.closed, self.fail = False, fail

    def write(self, record: Record) -> None:
        self.records.append(dict(record))

    def close(self) -> None:
        self.closed = True
        if self.fail:
            raise OSError("disk full")


def test_fan_out_gives_each_sink_each_record_and_refuses_unregistered_names() -> None:
    first, second = Recording(), Recording()
    sinks = FanOut([first, second])
    sinks.write({"step": 1})
    with pytest.raises(KeyError):
        sinks.write({"step": 2, "los": 1.0})
    assert first.records == second.records == [{"step": 1}]


def test_fan_out_closes_every_sink_although_one_fails() -> None:
    first, second = Recording(fail=True), Recording()
    with pytest.raises(OSError, match="disk full"):
        FanOut([first, second]).close()
    assert first.closed
    assert second.closed
