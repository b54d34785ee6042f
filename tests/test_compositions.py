"""Every pair of features that the checks allow is trained, and docs/composition.md says which pairs these are."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from compositions import BASE, FEATURES, PAGE, allowed_pairs, covering_runs, page, ranks_of, settings_of
from layouts import Result, full_unless, losses, problems, saved
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.observe.metrics import Record
from megascale.parallel.mesh import open_mesh
from megascale.train.build import open_run_data
from megascale.train.phases import train_phases
from megascale.train.run_folder import open_run_folder
from ranks import RankPool
from runs import Collected, one_process

RUNS = covering_runs()
BF16_LOSS = 2e-3


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python tests/compositions.py"


def test_the_runs_contain_every_allowed_pair() -> None:
    assert set(allowed_pairs()) <= {pair for run in RUNS for pair in combinations(run, 2)}


def train_on_rank(rank: int, size: int, settings: dict[str, Any]) -> list[Record]:
    config, data = open_run_data(Config.model_validate(settings))
    world, folder = one_process(rank, size), Path(config.run.folder) / config.run.name
    if rank == 0:
        open_run_folder(config)
    world.barrier()
    seen, mesh = Collected(folder / "STOP"), open_mesh(config.parallel, config.model, world)
    assert train_phases(config, data, mesh, folder, seen, 1, seen.stop, lambda _: None)[0] == "done"
    return seen.records


def train(ranks: RankPool, folder: Path, corpus: Path, name: str, features: tuple[str, ...]) -> Result:
    base = folder / "base.yaml"
    base.write_text(BASE)
    here = (f"run={{name: {name}, folder: {folder / 'runs'}}}", f"data.sources=[{{path: {corpus}}}]")
    # every step is kept: a phase adds parameters, which start behind its border
    settings = (*settings_of(features), *here, "model.vocab_size=null", "checkpoint={every: 1, keep_last: 9}")
    config = resolve(load_config(base, settings).config)
    records, *_ = ranks.run(train_on_rank, config.model_dump(), world_size=ranks_of(features))
    checkpoints = folder / "runs" / name / "checkpoints"
    first, last = (saved(checkpoints / f"step-{step:08d}", "model/") for step in (1, 3))
    if first.keys() != last.keys():
        first = saved(checkpoints / "step-00000002", "model/")
    return Result(losses(records), records, first, last)


@pytest.mark.slow
@pytest.mark.parametrize("number", full_unless(range(0, len(RUNS), 4), range(len(RUNS))))
def test_the_run_is_that_of_one_process(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, number: int) -> None:
    features = RUNS[number]
    found = train(ranks, tmp_path, tiny_corpus, "found", features)
    still = [name for name, weight in found.end.items() if weight.equal(found.start[name])]
    assert still == []
    plain = tuple(name for name in features if not FEATURES[name].layout)
    if plain == features:
        return
    expected = train(ranks, tmp_path, tiny_corpus, "expected", plain)
    if any(FEATURES[name].rounds for name in features):
        for ours, theirs in zip(found.curve, expected.curve, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=BF16_LOSS)
    else:
        wrong = [line for line in problems(found, expected) if not line.startswith("start of")]
        assert wrong == []
