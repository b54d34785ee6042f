"""`benchmarks.measure`: what a kernel's table compares."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu
from benchmarks.measure import attempt, form_rows, milliseconds, print_table

TIMES = {"ours": 2.0, "slow": 8.0, "quick": 4.0, "floor": 1.0}


def _rows(*forms: str, rival: tuple[str, float] | None = None) -> list[dict]:
    runs = dict.fromkeys(forms, lambda: None)
    return form_rows(torch.device("cpu"), "T=1", runs, TIMES, TIMES["floor"], {"GB": 3.0}, rival)


def test_forms_are_compared_with_the_best_other_and_with_the_floor() -> None:
    ours, slow, quick = _rows("ours", "slow", "quick")
    assert ours == {
        "case": "T=1", "form": "ours", "ms": 2.0, "best other / this": 2.0,
        "floor ms": 1.0, "share of floor": 0.5, "floor GB": 3.0, "peak MiB": None,
    }  # fmt: skip
    assert (slow["best other / this"], quick["best other / this"]) == (0.5, 1.0)


@pytest.mark.parametrize("rival, key, ratio", [(None, "best other / this", 1.0), (("compiled", 6.0), "compiled / this", 3.0)])
def test_a_form_without_others_is_its_own_rival_unless_one_is_named(
    rival: tuple[str, float] | None, key: str, ratio: float
) -> None:
    (row,) = _rows("ours", rival=rival)
    assert row[key] == ratio


def test_a_form_that_fails_loses_no_other() -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel")

    runs = {"ours": lambda: None, "broken": fails}
    times = milliseconds(torch.device("cpu"), runs, 2)
    assert times["ours"] >= 0 and math.isnan(times["broken"])
    ours, broken = form_rows(torch.device("cpu"), "T=1", runs, times | {"ours": 2.0}, 1.0, {})
    assert (ours["best other / this"], broken) == (1.0, {"case": "T=1", "form": "broken", "ms": "failed"})
    assert attempt(fails) == (None, "RuntimeError: no such kernel")


def test_rows_of_a_table_may_differ(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"a": 1}, {"b": 0.5}])
    assert capsys.readouterr().out.split() == ["a", "b", "1", "0.500"]


def test_a_part_that_takes_too_long_ends_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu.Part, "command", lambda self, device: [sys.executable, "-c", child])
    row = gpu.run_part(gpu.Part("slow", (), 1), "cpu", tmp_path, 2.0)
    assert row["exit"] == "stopped after 2 s"
    with suppress(psutil.NoSuchProcess):
        grandchild = psutil.Process(int((tmp_path / "slow.log").read_text().split()[0]))
        psutil.wait_procs([grandchild], timeout=20)
        assert grandchild.status() == psutil.STATUS_ZOMBIE, "nobody reaps it, but it has ended"


def test_without_a_gpu_its_benchmarks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "--device cpu tries the parts in small" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_results_are_kept_behind_each_part_and_trials_on_a_cpu_change_none(device: str, tmp_path: Path, monkeypatch) -> None:
    stored, out = tmp_path / "results", tmp_path / "out"
    stored.mkdir()
    out.mkdir()
    monkeypatch.setattr(gpu, "RESULTS", stored)
    (stored / "old.json").write_text("before")
    (stored / "untouched.json").write_text("before")
    results = gpu._Results(out, device)
    for text in ("first part", "second part"):
        (stored / "old.json").write_text(text)
        (stored / f"{text}.json").write_text(text)
        results.keep()
        assert (out / "old.json").read_text() == text
    assert sorted(path.name for path in out.iterdir()) == ["first part.json", "old.json", "second part.json"]
    left = {path.name: path.read_text() for path in stored.iterdir()}
    if device == "cpu":
        assert left == {"old.json": "before", "untouched.json": "before"}
    else:
        assert left["old.json"] == "second part" and len(left) == 4
