"""A run from its folder to its end: records, resume, stops, retention, and folders that do not fit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megascale.config.errors import InputError
from megascale.observe.dashboard import missing_panels, run_features
from megascale.observe.metrics import check_record, reproducible
from megascale.train.run_folder import open_run_folder
from megascale.train.stopping import StopRequest, write_exit
from runs import ALL_AXES, Run, losses, pretrain, tiny_config, train_tiny, write_config


@pytest.mark.parametrize("axes", [(), ALL_AXES], ids=["plain", "P=2 E=4 K=2"])
def test_every_metric_is_registered_and_no_panel_stays_empty(tmp_path: Path, tiny_corpus: Path, axes: tuple[str, ...]) -> None:
    config = tiny_config(tmp_path, tiny_corpus, "validation.every=3", "validation.sequences=4", *axes)
    run = train_tiny(config)
    logged = {name for record in run.records for name in record}
    check_record(logged)
    features = run_features(config, on_accelerator=False, peak_known=run.trainer.peak_flops is not None)
    assert missing_panels(logged, features) == []
    assert [record["step"] for record in run.records if "val/words/loss" in record] == [3, 6]


def test_the_loss_falls_and_validation_agrees(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus, "schedule.steps=40", "validation.every=40", *ALL_AXES)
    records = train_tiny(config).records
    assert records[0]["train/lm_loss"] == pytest.approx(5.7, abs=0.15)  # ln 300
    assert records[-1]["train/lm_loss"] < 4.7
    assert records[-1]["val/words/loss"] == pytest.approx(records[-1]["train/lm_loss"], abs=0.5)


def test_progress_counts_loss_tokens_sequences_and_flops(tmp_path: Path, tiny_corpus: Path) -> None:
    records = train_tiny(tiny_config(tmp_path, tiny_corpus, "batch.ramp=[{steps: 2, sequences: 2}]")).records
    assert [record["sequences"] for record in records] == [2, 4, 8, 12, 16, 20]
    tokens = [int(record["tokens"]) for record in records]
    assert all(0 < after - before <= 4 * 32 for before, after in zip([0, *tokens], tokens, strict=False))
    flops = [float(record["flops_total"]) for record in records]
    assert flops == sorted(flops)


@pytest.mark.slow
def test_a_compiled_run_whose_batch_grows_is_the_eager_run(tmp_path: Path, tiny_corpus: Path) -> None:
    """Other shapes make torch compile again, with open sizes."""
    growing = (*ALL_AXES, "batch.ramp=[{steps: 1, sequences: 2}, {steps: 1, sequences: 3}]", "schedule.steps=3")
    configs = [tiny_config(tmp_path, tiny_corpus, *growing, f"run.name={mode}", f"compile={mode}") for mode in ("off", "on")]
    eager, compiled = (losses(train_tiny(config).records) for config in configs)
    assert compiled == [pytest.approx(values, rel=1e-5) for values in eager]


@pytest.mark.parametrize("settings", [("optimizer.name=muon",), ("precision=bf16",), ()], ids=["muon", "bf16", "adamw"])
def test_a_resumed_run_ends_bit_equal(tmp_path: Path, tiny_corpus: Path, settings: tuple[str, ...]) -> None:
    common = (*ALL_AXES, "validation.every=2", *settings)
    whole = train_tiny(tiny_config(tmp_path, tiny_corpus, "run.name=whole", *common))
    first = Run(tiny_config(tmp_path, tiny_corpus, "run.name=cut", *common))
    (first.folder / "STOP").touch()
    assert first.train() == "stop"
    (first.folder / "STOP").unlink()
    second = train_tiny(tiny_config(tmp_path, tiny_corpus, "run.name=cut", *common))
    assert second.said[:1] == ["resuming from step-00000001"]
    together = [*first.records, *second.records]
    assert [reproducible(record) for record in together] == [reproducible(record) for record in whole.records]
    assert all(torch.equal(weight, second.weights[name]) for name, weight in whole.weights.items())


def test_a_finished_run_has_nothing_to_do(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus)
    train_tiny(config)
    again = Run(config)
    assert again.train() == "done"
    assert again.records == []


def test_another_seed_is_another_run(tmp_path: Path, tiny_corpus: Path) -> None:
    found = [
        train_tiny(tiny_config(tmp_path, tiny_corpus, f"run={{seed: {seed}, name: s{seed}, folder: {tmp_path}}}"))
        for seed in (1, 2)
    ]
    assert losses(found[0].records) != losses(found[1].records)


def test_old_checkpoints_are_removed_but_for_multiples(tmp_path: Path, tiny_corpus: Path) -> None:
    overrides = ("checkpoint={every: 1, keep_last: 2, keep_every: 3}", "schedule.steps=8")
    run = train_tiny(tiny_config(tmp_path, tiny_corpus, *overrides))
    assert sorted(path.name for path in run.trainer.checkpoints.iterdir()) == [f"step-0000000{s}" for s in (3, 6, 7, 8)]


def test_a_request_to_requeue_saves_and_names_the_reason(tmp_path: Path, tiny_corpus: Path) -> None:
    run = Run(tiny_config(tmp_path, tiny_corpus))
    run.stop.level = StopRequest.REQUEUE
    assert run.train() == "requeue"
    assert [path.name for path in run.trainer.checkpoints.iterdir()] == ["step-00000001"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts this process's signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number, level",
    [
        (signal.SIGTERM, StopRequest.REQUEUE),
        (signal.SIGUSR1, StopRequest.REQUEUE),
        (signal.SIGHUP, StopRequest.REQUEUE),
        (signal.SIGINT, StopRequest.STOP),
    ],
)
def test_signals_set_a_flag(tmp_path: Path, handlers: None, number: signal.Signals, level: int) -> None:
    stop = StopRequest(tmp_path / "STOP")
    assert stop.poll(0) == StopRequest.NONE
    os.kill(os.getpid(), number)
    assert (stop.poll(1), stop.cause) == (level, number.name)


def test_the_first_signal_decides(tmp_path: Path, handlers: None) -> None:
    """On Ctrl-C the terminal sends INT to all ranks, and deepspeed's launcher TERM after it."""
    stop = StopRequest(tmp_path / "STOP")
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.poll(0) == StopRequest.STOP


def test_a_hang_up_that_nohup_ignores_stays_ignored(tmp_path: Path, handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(tmp_path / "STOP")
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.poll(0) == StopRequest.NONE


@pytest.mark.parametrize("reason, code", [("done", 0), ("stop", 0), ("requeue", 85), ("error", 1), ("bad_input", 2)])
def test_exit_json_tells_the_reason_and_its_code(tmp_path: Path, reason: str, code: int) -> None:
    assert write_exit(tmp_path, reason, step=3) == code
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["reason"], record["code"], record["step"]) == (reason, code, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, tiny_corpus: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(
        InputError, match=r"run folder .*runs/tiny: cannot be written: Not a directory\n  -> choose another run.folder"
    ):
        open_run_folder(tiny_config(tmp_path, tiny_corpus))


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints/step-00000001"])
def test_a_folder_of_another_config_is_refused_with_the_keys_that_differ(tmp_path: Path, tiny_corpus: Path, trace: str) -> None:
    (open_run_folder(tiny_config(tmp_path, tiny_corpus)) / trace).write_text("a step was trained")
    with pytest.raises(InputError) as caught:
        open_run_folder(tiny_config(tmp_path, tiny_corpus, "model.width=64", "optimizer.lr=0.5"))
    text = str(caught.value)
    assert "model.width: 32 -> 64" in text
    assert "optimizer.lr: 0.01 -> 0.5" in text
    assert "choose another run.name=NAME" in text


@pytest.mark.parametrize("change", ["checkpoint.every=5", "observe.console_every=7", "guard.nonfinite_in_a_row=9"])
def test_settings_that_train_nothing_may_change(tmp_path: Path, tiny_corpus: Path, change: str) -> None:
    (open_run_folder(tiny_config(tmp_path, tiny_corpus)) / "metrics.jsonl").write_text("a step was trained")
    open_run_folder(tiny_config(tmp_path, tiny_corpus, change))


def test_a_folder_in_which_nothing_was_trained_takes_another_config(tmp_path: Path, tiny_corpus: Path) -> None:
    open_run_folder(tiny_config(tmp_path, tiny_corpus))
    folder = open_run_folder(tiny_config(tmp_path, tiny_corpus, "model.width=64"))
    assert "width: 64" in (folder / "config.yaml").read_text()


def test_a_folder_with_derived_settings_opens_again(tmp_path: Path, tiny_corpus: Path) -> None:
    overrides = (*ALL_AXES, "schedule.shape=wsd", "validation.every=2")
    for _ in range(2):
        (open_run_folder(tiny_config(tmp_path, tiny_corpus, *overrides)) / "metrics.jsonl").write_text("a step was trained")


def test_input_found_bad_after_the_folder_opened_is_told_in_exit_json(tmp_path: Path, tiny_corpus: Path) -> None:
    ended = pretrain(write_config(tmp_path, tiny_corpus), "optimizer.groups=[{pattern: '*', frozen: true}]")
    assert ended.returncode == 2 and "every parameter is frozen" in ended.stderr and "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "runs" / "tiny" / "exit.json").read_text())["code"] == 2
