"""What a run leaves for a person who must find out what it did: traces, stacks, the story of a failed checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.folders import list_checkpoints
from megascale.checkpoint.save import save_checkpoint
from runs import Run, pretrain, tiny_config, write_config


def test_profiled_steps_leave_a_trace_and_a_table(tmp_path: Path, tiny_corpus: Path) -> None:
    run = Run(tiny_config(tmp_path, tiny_corpus, "profile.steps=[2,3]"))
    run.train()
    names = sorted(path.name for path in (run.folder / "logs").iterdir())
    assert "trace-steps-2-3-rank-0.json.gz" in names
    table = (run.folder / "logs" / "profile-steps-2-3-rank-0.txt").read_text()
    assert "megascale::attention_backward" in table


def test_a_step_over_the_time_limit_ends_with_the_stacks_of_all_threads(tmp_path: Path, tiny_corpus: Path) -> None:
    ended = pretrain(write_config(tmp_path, tiny_corpus), "guard.timeout_seconds=0.001")
    assert ended.returncode != 0
    folder = tmp_path / "runs" / "tiny"
    stacks = (folder / "logs" / "stacks-rank-0.txt").read_text()
    assert "Timeout" in stacks and "trainer.py" in stacks
    assert json.loads((folder / "exit.json").read_text())["reason"] == "error"


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_checkpoint_that_does_not_fit_costs_itself_and_not_the_run(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    run, failed = Run(tiny_config(tmp_path, tiny_corpus, "checkpoint.every=2", f"checkpoint.background={background}")), []

    def full_at_step_4(folder: Path, step: int, *rest: Any, **more: Any) -> None:
        if step == 4:
            failed.append(4)
            raise SaveError("checkpoints", "no space left")
        save_checkpoint(folder, step, *rest, **more)

    for module in ("megascale.checkpoint.background", "megascale.train.trainer"):
        monkeypatch.setattr(f"{module}.save_checkpoint", full_at_step_4)
    assert run.train() == "done"
    assert failed == [4] and any("no checkpoint at step 4" in line for line in run.said)
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")] == ["step-00000006", "step-00000002"]
