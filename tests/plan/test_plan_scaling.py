"""Strong and weak scaling are the search's own layouts at each number of GPUs; numbers that train nothing are named with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megascale.cli import main
from megascale.config.errors import InputError
from megascale.config.schema import Config
from megascale.plan.cluster import load_cluster
from megascale.plan.layouts import can_be_laid_out, search
from megascale.plan.scaling import MOST_GPUS, USUAL, scale, scaling_facts, usual_counts
from megascale.plan.scaling_plots import PARTS, draw_scaling
from megascale.plan.time import StepTime
from plans import FINE, P4, config_file, plan_of

H100 = load_cluster("h100")


def config_of(folder: Path, *overrides: str) -> Config:
    return plan_of(folder, 1, *overrides, "parallel={}").config


def test_strong_scaling_keeps_the_step_and_takes_the_fastest_layouts(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    facts = scaling_facts(scale(config, H100, (8, 64, 16)), H100, 1e10)
    assert [row["gpus"] for row in facts["points"]] == [8, 16, 64]
    for row in facts["points"]:
        best = search(config, H100, row["gpus"], 1).found[0]
        assert row["step_seconds"] == best.time.total and row["step_tokens"] == 64 * 4096
        assert row["tokens_per_second"] == pytest.approx(64 * 4096 / best.time.total)
    first, _, last = facts["points"]
    assert last["efficiency"] == pytest.approx(first["step_seconds"] / last["step_seconds"] / 8)
    assert last["ideal_tokens_per_second"] == pytest.approx(8 * first["tokens_per_second"])
    assert last["useful_tokens_per_second"] == pytest.approx(last["tokens_per_second"] * last["cost"]["goodput"]["share"])
    assert first["efficiency"] == 1 > last["efficiency"]


def test_weak_scaling_lets_the_batch_and_its_ramp_grow(tmp_path: Path) -> None:
    config = config_of(tmp_path, "batch.ramp=[{steps: 5, sequences: 32}]")
    found = scale(config, H100, (8, 64), weak=True)
    assert [one.config.batch.sequences for one in found.found] == [64, 512]
    assert found.found[1].config.batch.ramp[0].sequences == 256
    first, last = scaling_facts(found, H100, 1e10)["points"]
    assert last["step_tokens"] == 8 * first["step_tokens"]
    small, large = found.found
    assert last["efficiency"] == pytest.approx(small.seconds / large.seconds)  # of the same steps, the ramp's among them
    assert small.seconds < 0.999 * sum(part.steps for part in small.parts) * first["step_seconds"]
    strong = scale(config, H100, (8, 64)).found[1]
    assert last["efficiency"] > first["step_seconds"] / strong.time.total / 8


def test_days_count_the_steps_of_phases_and_ramp(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        P4,
        "batch.ramp=[{steps: 10, sequences: 32}]",
        "schedule={phases: [{steps: 90, streams: 1, shape: constant}, {steps: 10}]}",
    )
    tokens = 4096 * (10 * 32 + 90 * 64)
    (row,) = scaling_facts(scale(config, H100, (8,), tokens=tokens), H100, tokens)["points"]
    assert [(part["steps"], part["streams"], part["sequences"]) for part in row["parts"]] == [
        (10, 1, 32),
        (80, 1, 64),
        (10, 4, 64),
    ]
    seconds = sum(part["steps"] * part["step_seconds"] for part in row["parts"])
    assert row["cost"]["days"] * row["cost"]["goodput"]["share"] == pytest.approx(seconds / 86400)
    assert row["tokens_per_second"] == pytest.approx(tokens / seconds)


def test_gpus_without_a_layout_are_named_with_the_nearest_that_have_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (left,) = scale(config, H100, (8, 1000)).left_out
    assert left.gpus == 1000 and "64 sequences a step, 8 layers and 16 heads cannot be shared evenly" in left.reason
    assert "the nearest numbers of GPUs: 896 and 1,024" in left.remedy
    works = [count for count in range(896, 1032, 8) if can_be_laid_out(config, H100, count)]
    assert works == [896, 1024]


def test_a_batch_that_grows_to_no_whole_number_is_named(tmp_path: Path) -> None:
    (left,) = scale(config_of(tmp_path), H100, (48, 64), weak=True).left_out
    assert (left.gpus, left.reason) == (64, "64 sequences a step at 48 GPUs grow to no whole number")


def test_gpus_with_too_little_memory_are_named_and_the_next_are_the_measure(tmp_path: Path) -> None:
    small = H100.model_copy(update={"memory_bytes": 8e9})
    found = scale(config_of(tmp_path), small, (1, 16, 32))
    (left,) = found.left_out
    assert left.gpus == 1 and "layouts fits" in left.reason
    assert scaling_facts(found, small, 1e10)["points"][0]["efficiency"] == 1


def test_usual_counts_reach_a_hundred_thousand_and_can_be_laid_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, "batch.sequences=4096")
    counts = usual_counts(config, H100)
    assert counts == [8, 64, 512, 4096, 16384, 32768, 65536, 98304]  # 100,000 = 2^5 5^5 shares no batch of 2^12
    assert all(can_be_laid_out(config, H100, count) for count in counts)
    assert not any(can_be_laid_out(config, H100, count) for count in range(98_312, 100_001, 8))
    assert usual_counts(config, H100, weak=True)[-1] == USUAL[-1]


def test_notes_say_what_the_numbers_leave_out(tmp_path: Path) -> None:
    def notes(*overrides: str, weak: bool = False) -> str:
        return "; ".join(scaling_facts(scale(config_of(tmp_path, *overrides), H100, (8, 16), weak), H100, 1e10)["notes"])

    assert "part of what is trained" in notes(FINE) and "part of what is trained" not in notes()
    assert "trains less with each token" in notes(weak=True) and "trains less" not in notes()
    assert "more than any published run" not in notes()


@pytest.mark.parametrize("gpus", [(), (0, 8), (8, MOST_GPUS + 1)])
def test_senseless_numbers_are_refused(tmp_path: Path, gpus: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="are no numbers of GPUs"):
        scale(config_of(tmp_path), H100, gpus)


def test_a_run_that_no_number_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--gpus 131: 64 sequences a step"):
        scale(config_of(tmp_path), H100, (131, 1000))


def test_the_picture_has_ideal_planned_and_useful_and_the_whole_step(tmp_path: Path) -> None:
    facts = scaling_facts(scale(config_of(tmp_path, "batch.sequences=512"), H100, (8, 512, 4096)), H100, 1e10)
    speed, efficiency, step = draw_scaling(facts)
    ideal, planned, useful = (np.asarray(line.get_ydata()) for line in speed.lines)
    assert planned.tolist() == [row["tokens_per_second"] for row in facts["points"]]
    assert (useful < planned).all() and ideal[-1] > planned[-1]
    assert len(efficiency.lines) == 4
    ends = [bar.get_y() + bar.get_height() for bar in step.patches]
    assert max(ends) <= 1 + 1e-9
    assert {name for names in PARTS.values() for name in names} == set(StepTime.__dataclass_fields__)
    assert any("above 3,072" in text.get_text() for text in speed.get_legend().get_texts())


def test_table_json_and_picture_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "scaling", "batch.sequences=128", "--config", str(config_file(tmp_path)), "--cluster", "h100"]
    words += ["--gpus", "8,16,1000", "--tokens", "1e10"]
    assert main([*words, "--weak"]) == 0
    text = capsys.readouterr().out
    picture = tmp_path / "scaling.png"
    assert main([*words, "--weak", "--json", "--plot", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert facts["points"][0]["sequences"] == 128
    assert text.startswith("weak scaling of planned") and all(row["layout"] in text for row in facts["points"])
    assert all(note in text for note in facts["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scaling", "--cluster", "h100"), "--config: is missing"),
        (("scaling", "CONFIG", "--gpus", "8"), "--cluster: is missing"),
        (("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8,x"), "--gpus: '8,x' is no list of whole numbers"),
        (("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8", "--top", "3"), "--top: is not read by the scaling"),
        (("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8", "--write", "x.yaml"), "--write: is not read"),
        (("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8", "--tokens", "nan"), "--tokens: nan is no number"),
        (("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8", "--imbalance", "0.5"), "--imbalance: 0.5 is no factor"),
        (
            ("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8", "--flops", "1e22"),
            "--flops: is read by the search over axes",
        ),
        (("scaling", "precision=fp32", "CONFIG", "--cluster", "h100", "--gpus", "8"), "precision: fp32 has another peak"),
        (("scaling", "CONFIG", "--cluster", "h100", "--gpus", "8", "--plot", "x.what"), "x.what: cannot be written"),
        (("CONFIG", "--cluster", "h100", "--gpus", "8,16"), "--gpus: '8,16' is no whole number"),
        (("CONFIG", "--cluster", "h100", "--gpus", "8", "--weak"), "--weak: is read by the scaling"),
        (("CONFIG", "--cluster", "h100", "--gpus", "8", "--plot", "x.png"), "--plot: is read by the scaling"),
        (("axes", "--cluster", "h100", "--flops", "1e20", "--weak"), "--weak: is not read by the search over axes"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    given = [part for word in words for part in (("--config", str(config_file(tmp_path))) if word == "CONFIG" else (word,))]
    assert main(["plan", *given]) == 2
    assert message in capsys.readouterr().err
