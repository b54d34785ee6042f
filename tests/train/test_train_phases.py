"""Two-stage training in one run: P = 1, then P > 1 on the same trunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layouts import saved
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.phases import span_at, spans
from megascale.config.schema import Config
from megascale.observe.sinks import read_metrics
from megascale.parallel.stages import stage_layers
from megascale.train.build import open_run_data
from megascale.train.load_run import load_model, load_run
from megascale.train.recovery import WINDOW, Recovery
from megascale.train.start import recorded
from ranks import RankPool
from runs import pretrain, tiny_config, train_phases_on_rank, write_config
from starts import save_foreign

STREAMS = "model.streams={count: 2, prefix_tokens: 4}"
PHASES = (
    STREAMS,
    "model.layers=4",
    "optimizer={lr: 0.01, eps: 1e-5}",
    "schedule={phases: [{steps: 3, streams: 1, shape: constant}, {steps: 3, shape: constant, lr_scale: 0.5, new_warmup_steps: 2}]}",
)
NEW = {"model/aggregator.hidden.weight", "model/aggregator.mix.bias", "model/layers.0.attention.prefix_k"}


def run(config: Config, stop_after: int = 0) -> list:
    return train_phases_on_rank(0, 1, config.model_dump(), stop_after)


def step(folder: Path, number: int, name: str = "tiny") -> dict[str, torch.Tensor]:
    return saved(folder / "runs" / name / "checkpoints" / f"step-{number:08d}")


def test_the_trunk_goes_on_and_the_new_tensors_begin(tmp_path: Path, tiny_corpus: Path) -> None:
    records = run(tiny_config(tmp_path, tiny_corpus, *PHASES, "checkpoint={every: 1, keep_last: 9}"))
    assert [(r["step"], r["phase"]) for r in records] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    border, after = step(tmp_path, 3), step(tmp_path, 4)
    assert not NEW & border.keys()
    assert after.keys() > NEW
    # step counts and moments of the trunk go on, those of the new tensors begin
    assert float(after["adamw.step/layers.0.attention.q.weight"]) == 4
    assert float(after["adamw.step/layers.0.attention.prefix_k"]) == 1
    # one step at half the learning rate moves a weight by about that much: the trunk was not drawn anew
    name = "model/layers.0.attention.q.weight"
    assert 0 < float((after[name] - border[name]).abs().max()) < 0.02
    # what is new warms up on top of the schedule
    rates = [{k.removeprefix("optim/lr/"): v for k, v in r.items() if k.startswith("optim/lr/")} for r in records]
    assert rates[2]["matrices"] == 0.01
    assert "prefixes_new" not in rates[2]
    assert [r["matrices"] for r in rates[3:]] == [0.005] * 3
    assert [r["prefixes_new"] for r in rates[3:]] == [0.0025, 0.005, 0.005]
    # the sample order goes on
    assert [r["sequences"] for r in records] == [4, 8, 12, 16, 20, 24]
    assert records[3]["phase/loss_bump"] == pytest.approx(
        records[3]["train/lm_loss"] - sum(r["train/lm_loss"] for r in records[:3]) / 3
    )


def test_the_first_phase_is_the_run_without_streams(tmp_path: Path, tiny_corpus: Path) -> None:
    phased = run(tiny_config(tmp_path, tiny_corpus, *PHASES))
    plain = run(
        tiny_config(
            tmp_path, tiny_corpus, "run.name=plain", *PHASES[1:3], "schedule={steps: 3, warmup_steps: 0, shape: constant}"
        )
    )
    assert [r["train/lm_loss"] for r in phased[:3]] == [r["train/lm_loss"] for r in plain]


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_resume_inside_either_phase_and_at_the_border_changes_no_bit(
    tmp_path: Path, tiny_corpus: Path, stop_after: int
) -> None:
    whole = run(tiny_config(tmp_path, tiny_corpus, *PHASES, "run.name=whole"))
    config = tiny_config(tmp_path, tiny_corpus, *PHASES)
    halves = run(config, stop_after) + run(config)
    reproducible = [{k: v for k, v in r.items() if not k.startswith(("perf/", "memory/"))} for r in (*whole, *halves)]
    assert reproducible[:6] == reproducible[6:]
    one, two = step(tmp_path, 6, "whole"), step(tmp_path, 6)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_moments_start_anew_on_request(tmp_path: Path, tiny_corpus: Path) -> None:
    phases = PHASES[-1].replace("new_warmup_steps: 2", "reset_optimizer: true")
    run(tiny_config(tmp_path, tiny_corpus, *PHASES[:-1], phases))
    assert float(step(tmp_path, 6)["adamw.step/layers.0.attention.q.weight"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["{tp: 2, zero_stage: 0}", "{pp: 2, zero_stage: 0}", "{zero_stage: 1}"])
def test_phases_hold_in_layouts(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, parallel: str) -> None:
    alone = run(tiny_config(tmp_path, tiny_corpus, *PHASES, "run.name=alone", "batch.micro_batches=2"))
    config = tiny_config(tmp_path, tiny_corpus, *PHASES, "batch.micro_batches=2", f"parallel={parallel}")
    found = ranks.run(train_phases_on_rank, config.model_dump(), 0, world_size=2)[0]
    for name in ("train/lm_loss", "train/grad_norm"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in alone], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["{pp: 2, zero_stage: 1}", "{pp: 2, schedule: zero_bubble, zero_stage: 0}"])
def test_more_streams_cut_the_stages_anew_and_moments_follow_the_layers(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, parallel: str
) -> None:
    """With one stream the head costs more than a layer, with two less: a layer moves to the other rank at the border."""
    settings = (*PHASES, "model.ffn_width=32", "batch.micro_batches=2", "optimizer.clip=null", "checkpoint.keep_last=9")
    alone = run(tiny_config(tmp_path, tiny_corpus, *settings, "run.name=alone"))
    config, _ = open_run_data(tiny_config(tmp_path, tiny_corpus, *settings, f"parallel={parallel}"))
    cuts = [[len(layers) for layers in stage_layers(span.config)] for span in spans(config)]
    assert cuts == [[3, 1], [2, 2]]
    halves = [ranks.run(train_phases_on_rank, config.model_dump(), stop, world_size=2)[0] for stop in (4, 0)]
    for name in ("train/lm_loss", "train/grad_norm"):
        assert [r[name] for half in halves for r in half] == pytest.approx([r[name] for r in alone], rel=1e-5)
    for number in (3, 6):
        expected, found = step(tmp_path, number, "alone"), step(tmp_path, number)
        assert expected.keys() == found.keys()
        for name in expected:
            if name.startswith("adamw."):
                assert torch.linalg.vector_norm(found[name] - expected[name]) <= 1e-3 * torch.linalg.vector_norm(expected[name])


IMPORTED = (PHASES[0], PHASES[2], PHASES[3], "model.qkv_bias=true", "batch.micro_batches=2")


def import_foreign(folder: Path, corpus: Path, name: str) -> None:
    """A run folder out of a Qwen2 of transformers."""
    if not (folder / "hf").exists():
        save_foreign(folder / "hf", corpus)
    import_folder(folder / "hf", folder / "runs" / name)


def test_imported_weights_get_streams_in_the_second_phase(tmp_path: Path, tiny_corpus: Path) -> None:
    import_foreign(tmp_path, tiny_corpus, "tiny")
    there = load_model(tmp_path / "hf").decoder.get_parameter("norm.weight")
    records = run(tiny_config(tmp_path, tiny_corpus, *IMPORTED, "checkpoint={every: 3, keep_last: 9}"))
    assert [(r["step"], r["phase"]) for r in records] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert not NEW & step(tmp_path, 3).keys()
    assert step(tmp_path, 6).keys() > NEW
    assert 0 < float((step(tmp_path, 6)["model/norm.weight"] - there).abs().max()) < 0.1
    assert recorded(tmp_path / "runs/tiny")["path"] == str(tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", ["{tp: 2, zero_stage: 0}", "{pp: 2, zero_stage: 0}", "{zero_stage: 1}", "{pp: 2, zero_stage: 1}"]
)
def test_phases_of_an_imported_run_hold_in_layouts(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, parallel: str) -> None:
    import_foreign(tmp_path, tiny_corpus, "alone")
    import_foreign(tmp_path, tiny_corpus, "tiny")
    alone = run(tiny_config(tmp_path, tiny_corpus, *IMPORTED, "run.name=alone"))
    config = tiny_config(tmp_path, tiny_corpus, *IMPORTED, f"parallel={parallel}")
    found = ranks.run(train_phases_on_rank, config.model_dump(), 0, world_size=2)[0]
    for name in ("train/lm_loss", "train/grad_norm"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in alone], rel=1e-5)


@pytest.mark.slow
def test_the_command_trains_all_phases_and_each_checkpoint_loads(tmp_path: Path, tiny_corpus: Path) -> None:
    done = pretrain(
        write_config(tmp_path, tiny_corpus),
        *PHASES,
        "checkpoint.keep_last=9",
        "checkpoint.every=3",
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert [r["phase"] for r in read_metrics(folder / "metrics.jsonl")] == [0, 0, 0, 1, 1, 1]
    assert load_run(folder, 3).decoder.config.streams.count == 1
    assert load_run(folder).decoder.config.streams.count == 2


def test_spans_count_the_steps_of_the_run(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus, *PHASES)
    assert config.schedule.steps == 6
    assert [(s.before, s.last, s.config.model.streams.count) for s in spans(config)] == [(0, 3, 1), (3, 6, 2)]
    assert [span_at(config, n).number for n in range(7)] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{steps: 3, streams: 1}, {steps: 3, streams: 3}]", "3 streams; a phase has 1 or model.streams.count (2)"),
        ("[{steps: 3}, {steps: 3, streams: 1}]", "1 after 2 streams"),
        ("[{steps: 3, streams: 1}]", "no phase trains the 2 streams"),
        ("[{steps: 3, warmup_steps: 4}]", "warmup_steps 4 is more than steps 3"),
        ("[{steps: 3, reset_optimizer: true}]", "the first phase has nothing before it"),
    ],
)
def test_phases_that_contradict_are_refused(tmp_path: Path, tiny_corpus: Path, phases: str, message: str) -> None:
    loaded = load_config(write_config(tmp_path, tiny_corpus), [STREAMS, f"schedule={{phases: {phases}}}"])
    with pytest.raises(InputError) as caught:
        check(loaded)
    assert message in str(caught.value)


def test_recovery_is_told_once() -> None:
    recovery = Recovery()
    for loss in (4.0, 3.0, 2.0):
        assert recovery.add(loss, 0) == {}
    recovery.begin(100)
    told = [recovery.add(loss, 110 + 10 * i) for i, loss in enumerate([5.0] + [2.5] * 25)]
    assert told[0] == {"phase/loss_bump": 2.0}
    assert [(i, t) for i, t in enumerate(told) if t and i] == [(WINDOW - 1, {"phase/tokens_to_recover": 100})]
