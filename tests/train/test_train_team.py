"""Several ranks evaluate and generate as one process does, whatever the layout; and what does not fit is told once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from layouts import full_unless
from megascale.cli import main
from megascale.config.errors import InputError
from megascale.train.evaluate import evaluate
from megascale.train.load_run import load_model, load_run
from megascale.train.sampling import SamplingOptions, generate
from megascale.train.team import Team, read_parallel
from ranks import RankPool
from runs import ROOT, one_process

PROMPT = [5, 17, 3, 60, 2]
WARM = SamplingOptions(tokens=40, temperature=1.5, seed=3)
LAYOUTS = {
    "dp3": (3, "{}"),
    "tp2": (2, "{tp: 2}"),
    "dp2-ep2": (2, "{ep: 2}"),
    "tp2-pp2": (4, "{tp: 2, pp: 2}"),
    "tp2-ep4-dp2": (4, "{tp: 2, ep: 4}"),
    "pp2-dp2-ep2": (4, "{pp: 2, ep: 2}"),
    "tp2-etp2": (2, "{tp: 2, etp: 2}"),
    "tp2-ep2-etp2-dp2": (4, "{tp: 2, ep: 2, etp: 2}"),
}
ONLY_EVALUATION = {
    "cp2": (2, "{cp: 2}"),
    "cp2-ulysses": (2, "{cp: 2, context: ulysses}"),
    "stream2": (2, "{stream: 2}"),
    "stream2-cp2-tp2": (8, "{stream: 2, cp: 2, tp: 2}"),
}


def team_of(rank: int, size: int, parallel: str) -> Team:
    return Team(one_process(rank, size), read_parallel(parallel))


def losses_on_rank(rank: int, size: int, folder: str, parallel: str) -> list[dict]:
    run = load_run(Path(folder), team=team_of(rank, size, parallel))
    return [evaluate(run, sequences, None, stride) for sequences in run.validation.values() for stride in (None, 16)]


def texts_on_rank(rank: int, size: int, folder: str, parallel: str) -> list[list[int | None]]:
    model = load_model(Path(folder), team=team_of(rank, size, parallel))
    return list(generate(model.stages, PROMPT, 3, 32, 7, WARM))


@pytest.mark.slow
@pytest.mark.parametrize("name", full_unless(["dp3", "tp2-pp2", "stream2"], [*LAYOUTS, *ONLY_EVALUATION]))
def test_a_layout_scores_as_one_process(ranks: RankPool, tiny_run: Path, name: str) -> None:
    size, parallel = {**LAYOUTS, **ONLY_EVALUATION}[name]
    first, *others = ranks.run(losses_on_rank, str(tiny_run), parallel, world_size=size)
    assert all(found == first for found in others)
    for found, expected in zip(first, losses_on_rank(0, 1, str(tiny_run), "{}"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", full_unless(["tp2-pp2", "tp2-ep4-dp2"], LAYOUTS))
def test_a_layout_generates_the_texts_of_one_process(ranks: RankPool, tiny_run: Path, name: str) -> None:
    size, parallel = LAYOUTS[name]
    expected = texts_on_rank(0, 1, str(tiny_run), "{}")
    assert len(expected) > 32 - len(PROMPT), "the window has to slide"
    for found in ranks.run(texts_on_rank, str(tiny_run), parallel, world_size=size):
        assert found == expected


@pytest.mark.slow
def test_a_hugging_face_folder_in_a_layout(ranks: RankPool, tiny_run: Path, tmp_path: Path) -> None:
    assert main(["convert", str(tiny_run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    expected = texts_on_rank(0, 1, str(tiny_run), "{}")
    assert ranks.run(texts_on_rank, str(tmp_path / "hf"), "{tp: 2, pp: 2}", world_size=4) == [expected] * 4


def fails_on_rank_1(rank: int, size: int) -> tuple[str, bool]:
    def work() -> None:
        if rank == 1:
            raise InputError("here", "this", "that")

    try:
        team_of(rank, size, "{}").together(work)
    except InputError as error:
        return str(error), error.told
    return "", False


def test_what_fails_on_one_rank_fails_on_all_and_one_of_them_tells(ranks: RankPool) -> None:
    text = str(InputError("here", "this", "that"))
    assert ranks.run(fails_on_rank_1, world_size=2) == [(text, False), (text, True)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tp: [", "is no YAML"),
        ("2", "is no mapping"),
        ("{schedule: zbv}", "schedule: nothing that a forward pass needs"),
        ("{tp: 0}", "tp: input should be greater than 0, given 0"),
        ("{tp: two}", "tp: input should be a valid integer"),
    ],
)
def test_a_layout_that_cannot_be_read_is_named(text: str, part: str) -> None:
    with pytest.raises(InputError, match="--parallel") as caught:
        read_parallel(text)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "part"),
    [
        ("{tp: 2}", "one process was started"),
        ("{tp: 3}", "tp 3 does not divide"),
        ("{ep: 8}", "does not divide model.experts.count 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tiny_run: Path, parallel: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        load_run(tiny_run, team=team_of(0, 1, parallel))
    assert part in str(caught.value) and "torchrun" in str(caught.value)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "megascale"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_generation_under_a_launcher_is_printed_once(tiny_run: Path) -> None:
    done = torchrun("generate", str(tiny_run), "--parallel", "{tp: 2}", "--prompt", "def ", "--tokens", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"][0]["tokens"] == 5


@pytest.mark.slow
@pytest.mark.full
def test_a_layout_that_does_not_fit_is_told_once(tiny_run: Path) -> None:
    done = torchrun("eval", str(tiny_run), "--parallel", "{tp: 3}")
    assert done.returncode != 0
    assert done.stderr.count("tp 3 does not divide") == 1, done.stderr
