"""Fits of one's own runs in the search over axes: a law more, and a_K with its interval."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.laws.registry import form_named
from megascale.laws.study import save, study
from megascale.laws.table import RunTable
from megascale.plan.axis_candidates import Axes, Workload
from megascale.plan.axis_report import axis_report
from megascale.plan.axis_search import Limits, search_axes
from megascale.plan.axis_text import axis_lines
from megascale.plan.cluster import load_cluster
from megascale.plan.own_fits import Own, read_own

PLANTED = {
    "blocks": {"b": 0.06, "alpha": 0.3, "E": 1.7, "A": 2e8},
    "chinchilla": {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28},
    "parscale": {"E": 1.3, "A": 2e8, "k": 0.33, "alpha": 0.2},
}
LEVELS = {"N": np.geomspace(1e7, 1e9, 4), "D": np.geomspace(1e9, 1e11, 4), "K": (1, 2, 4), "P": (1, 2, 4)}
AXES = Axes(streams=(1, 2), experts=(1, 8), per_token=(1,), blocks=(1, 2))


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved fits, each to runs that obey its form but for noise of 0.1 %."""
    folder, noise = tmp_path_factory.mktemp("fits"), np.random.default_rng(0)
    for name, values in PLANTED.items():
        form = form_named(name)
        cells = np.array(list(itertools.product(*(LEVELS[symbol] for symbol in form.inputs))), dtype=float)
        columns = {symbol: cells[:, i] for i, symbol in enumerate(form.inputs)}
        columns["loss"] = form.evaluate(values, columns) * np.exp(1e-3 * noise.standard_normal(len(cells)))
        save(study(name, RunTable("planted runs", columns), draws=20), folder / f"{name}.json")
    return folder


def searched(own: Own):
    return search_axes(1e20, load_cluster("a100"), Limits(4 * 2**30), AXES, Workload(sequence=2048, context=2048), own, 0)


def test_a_fit_of_blocks_is_a_k_with_its_interval(fits: Path) -> None:
    own = read_own([fits / "blocks.json"], {})
    worth = own.worth(np.array([1.0, 2.0, 4.0]))
    assert worth.middle == pytest.approx([1, 2**0.06, 4**0.06], rel=5e-3)
    assert worth.low[0] == worth.high[0] == 1
    assert (worth.low[1:] < worth.middle[1:]).all() and (worth.middle[1:] < worth.high[1:]).all()
    found = searched(own)
    of = {int(count): found.judged[0].ratio.middle[found.table.sizes.blocks == count] for count in (1, 2)}
    assert (of[2] / of[1]).max() == pytest.approx(worth.middle[1], rel=1e-3)
    text = "\n".join(axis_lines(axis_report(found, 0)))
    assert "a_K = K^b with b = 0.0" in text and "a_K 1.04 [1.0" in text


def test_a_design_outside_the_runs_of_the_fit_is_flagged(fits: Path) -> None:
    found = searched(read_own([fits / "blocks.json"], {}))
    at = int(np.flatnonzero((found.table.sizes.blocks == 2) & (found.table.sizes.non_embedding > 1e9))[0])
    assert found.own.outside(found.table.sizes.at(at)) == {"blocks": ["N"]}
    plain = int(np.flatnonzero(found.table.sizes.blocks == 1)[0])
    assert found.own.outside(found.table.sizes.at(plain)) == {}


def test_a_fit_of_n_and_d_is_one_law_more(fits: Path) -> None:
    renamed = fits / "mine.json"
    renamed.write_bytes((fits / "chinchilla.json").read_bytes())
    found = searched(read_own([renamed], {}))
    mine = found.judged[-1]
    assert mine.base.name == "mine" and len(found.judged) == len(searched(Own()).judged) + 1
    dense = int(np.flatnonzero((found.table.sizes.streams == 1) & (found.table.sizes.experts == 1))[0])
    v, n, d = PLANTED["chinchilla"], found.table.sizes.parameters[dense], found.tokens[dense]
    assert mine.loss[dense] == pytest.approx(v["E"] + v["A"] / n ** v["alpha"] + v["B"] / d ** v["beta"], rel=5e-3)
    assert mine.low[dense] < mine.loss[dense] < mine.high[dense]
    facts = axis_report(found, 0)
    assert any(law["law"] == "mine" and law["interval"] == "20 refits of your runs" for law in facts["laws"])
    assert any("N=N_with_embeddings" in caveat for caveat in facts["caveats"])


@pytest.mark.parametrize(
    ("names", "given", "reason"),
    [
        (("parscale",), {}, "a fit of parscale, which the search has no use for"),
        (("chinchilla",), {}, "a law 'chinchilla' already"),
        (("blocks", "blocks"), {}, "a law 'blocks' already"),
        (("blocks",), {2: 1.1}, "--blocks-worth both say"),
        (("nothing",), {}, "no such file"),
    ],
)
def test_fits_that_have_no_place_are_refused(fits: Path, names: tuple[str, ...], given: dict[int, float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_own([fits / f"{name}.json" for name in names], given)


def test_a_second_fit_of_blocks_is_refused(fits: Path) -> None:
    again = fits / "again.json"
    again.write_bytes((fits / "blocks.json").read_bytes())
    with pytest.raises(InputError, match="give one fit of blocks"):
        read_own([fits / "blocks.json", again], {})
