"""megascale doctor: the verdicts, and that the self test notices a run that does not resume as it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megascale.cli import main
from megascale.train import machine, self_test
from megascale.train.machine import FAILED, Finding
from megascale.train.self_test import SelfTest, SelfTestError, run_self_test, weights_digest


def test_a_machine_that_can_train_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-self-test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"]
    names = [finding["name"] for finding in found["findings"]]
    assert {"python", "torch", "triton", "devices", "torch.compile", "cores, memory", "disk", "W&B"} <= set(names)


def test_a_missing_package_fails_and_nothing_that_needs_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "REQUIRED", ("torch", "a-package-that-is-not-there"))
    monkeypatch.setattr(self_test, "run_self_test", lambda: [Finding("reached", FAILED, "")])
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "failed: a-package-that-is-not-there" in printed
    assert "reached" not in printed


def test_the_digest_sees_one_changed_weight_and_nothing_else(tiny_run: Path, tmp_path: Path) -> None:
    assert weights_digest(tiny_run) == weights_digest(tiny_run)
    with pytest.raises(SelfTestError, match="no checkpoint"):
        weights_digest(tmp_path)


def test_runs_with_other_weights_differ(tiny_run: Path, tmp_path: Path) -> None:
    test = SelfTest(tiny_run.parent)
    assert "bit for bit" in test.compare("tiny", "tiny")
    earlier = tmp_path / "earlier" / "checkpoints"
    earlier.mkdir(parents=True)
    (earlier / "step-00000002").symlink_to(tiny_run / "checkpoints" / "step-00000002")
    with pytest.raises(SelfTestError, match="differ"):
        test.compare("tiny", str(tmp_path / "earlier"))


def test_a_failure_ends_the_self_test_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_CONFIG", self_test._CONFIG.replace("width: 32", "width: 33"))
    *before, last = run_self_test()
    assert [finding.name for finding in before] == ["make a corpus"]
    assert (last.name, last.verdict) == ("train", FAILED)
    assert "33" in last.text


@pytest.mark.slow
def test_two_ranks_train_stop_and_resume_to_the_same_weights() -> None:
    findings = list(run_self_test())
    assert [finding.name for finding in findings] == ["make a corpus", "train", "stop", "resume", "resumed weights"]
    assert all(finding.verdict != FAILED for finding in findings), findings
