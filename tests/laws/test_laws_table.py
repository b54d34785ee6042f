"""Tables of runs: csv files with their columns named, and our own run folders."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megascale.config.errors import InputError
from megascale.laws.refusals import BadTable
from megascale.laws.run_folders import read_table
from megascale.laws.table import read_csv

RUNS = """# a comment
size,tokens,val,router,id,step
1e8,2e9,3.5,hash,a,1
1e8,2e9,3.1,hash,a,2
1e8,2e9,,hash,a,3
2e8,2e9,2.9,dense,b,2
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(RUNS)
    return path


def test_columns_are_named_by_option(runs: Path) -> None:
    table = read_csv(runs, {"N": "size", "D": "130e9", "loss": "val"}, {"step": ("2",)})
    assert table.columns["N"].tolist() == [1e8, 2e8]
    assert table.columns["D"].tolist() == [130e9, 130e9]
    assert table.loss.tolist() == [3.1, 2.9]
    assert table.labels["router"] == ("hash", "dense")


def test_the_last_evaluation_with_a_loss_counts(runs: Path) -> None:
    assert read_csv(runs, {"loss": "val", "N": "size"}, run="id").loss.tolist() == [3.1, 2.9]


def test_compressed_files_are_read(runs: Path, tmp_path: Path) -> None:
    packed = tmp_path / "runs.csv.gz"
    packed.write_bytes(gzip.compress(runs.read_bytes()))
    assert read_csv(packed, {"loss": "val"}, {"step": ("2",)}).loss.tolist() == [3.1, 2.9]


@pytest.mark.parametrize(
    "text,mapping,where,words",
    [
        (RUNS, {}, {}, "no column of losses"),
        (RUNS, {"loss": "val", "N": "siez"}, {}, "no column 'siez' for N"),
        (RUNS, {"loss": "val"}, {"rooter": ("hash",)}, "no column 'rooter'"),
        (RUNS, {"loss": "val"}, {"router": ("s-base",)}, "none of its 4 rows"),
        (RUNS, {"loss": "val"}, {}, "run 3: val is '', not a number"),
        ("N,loss\n1,0.5\n1,-2\n", {}, {}, "not positive"),
        ("N,loss\n1,nan\n", {}, {}, "not a number"),
        ("N,loss\n1\n", {}, {}, "more or fewer cells"),
        ("N,loss\n", {}, {}, "holds no row"),
        ("N,loss, N\n1,2,3\n", {}, {}, "several columns named N"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, mapping, where, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(BadTable, match=words) as caught:
        read_csv(path, mapping, where)
    assert caught.value.place == str(path) and caught.value.remedy


@pytest.mark.parametrize("cell", ["", "nan", "inf", "1e8x"])
def test_an_input_with_a_cell_that_is_no_number_is_named_with_its_run(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "spoilt.csv"
    path.write_text(f"N,router,loss\n1e8,hash,3\n{cell},hash,2\n")
    table = read_csv(path)
    with pytest.raises(BadTable, match=f"run 2: N is '{cell}', not a number"):
        table.inputs(("N",))
    assert table.labels["router"] == ("hash", "hash")


def test_headers_may_hold_a_byte_order_mark_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "spreadsheet.csv"
    path.write_bytes("\ufeffN , loss\n1e8, 3\n".encode())
    table = read_csv(path)
    assert table.columns["N"].tolist() == [1e8] and table.loss.tolist() == [3.0]


@pytest.mark.parametrize(
    "spoil", [lambda packed: packed[:-12], lambda packed: packed[:12] + b"\xff" * 20], ids=["cut", "garbled"]
)
def test_a_spoilt_compressed_file_is_refused(runs: Path, tmp_path: Path, spoil) -> None:
    path = tmp_path / "runs.csv.gz"
    path.write_bytes(spoil(gzip.compress(runs.read_bytes())))
    with pytest.raises(BadTable, match="is no text"):
        read_csv(path, {"loss": "val"})


def run_folder(folder: Path, settings: str = "", ended: str = "done", **metrics: float) -> Path:
    """A run folder as training leaves it, without its weights."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"model: {{vocab_size: 300, width: 32, layers: 2, heads: 4, ffn_width: 64{settings}}}\nschedule: {{steps: 2, warmup_steps: 1}}\n"
    )
    common = {"lineage": 1, "tokens": 4096, "flops_total": 3e9, "data/epoch/words": 2.0, "data/share/words": 1.0}
    records = [
        {**common, "step": 1, "train/lm_loss": 5.0},
        {**common, "step": 2, "train/lm_loss": 4.0, "val/words/loss": 4.5, **metrics},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "exit.json").write_text(json.dumps({"reason": ended}))
    return folder


def test_run_folders_are_a_table(tmp_path: Path) -> None:
    dense = run_folder(tmp_path / "dense")
    routed = run_folder(tmp_path / "routed", ", experts: {count: 4, per_token: 1, width: 64}")
    streams = run_folder(tmp_path / "streams", ", streams: {count: 2, prefix_tokens: 4}")
    table = read_table([dense, routed / "metrics.jsonl", streams])
    expert, router = 3 * 32 * 64, 4 * 32
    n = table.columns["N"]
    assert n[0] == 2 * (4 * 32 * 32 + expert) + 5 * 32  # attention, feed-forward, norms
    assert n[1] == n[0] + 2 * router  # one expert of four is as large as the dense feed-forward
    assert table.columns["N_total"][1] == n[1] + 2 * 3 * expert + 2 * 300 * 32
    assert table.columns["N_with_embeddings"][0] == n[0] + 2 * 300 * 32
    assert n[2] > n[0]  # prefixes and the aggregator count
    assert table.columns["E"].tolist() == [1, 4, 1]
    assert table.columns["P"].tolist() == [1, 1, 2]
    assert table.loss.tolist() == [4.5, 4.5, 4.5]
    assert table.columns["U"].tolist() == [2048.0] * 3  # two epochs
    assert table.columns["F"] == pytest.approx(np.full(3, 3e9 / 4096 / 3 / 1e12))
    assert table.labels["router"] == ("dense", "softmax", "dense")
    assert read_table([dense], {"N": "N_total"}).columns["N"][0] == table.columns["N_total"][0]
    assert read_table([dense], loss="train/lm_loss").loss.tolist() == [4.0]


def test_runs_that_are_no_points_of_a_law_are_refused(tmp_path: Path) -> None:
    stopped = run_folder(tmp_path / "stopped", ended="stop")
    with pytest.raises(BadTable, match=r"did not reach its end \(stop\)"):
        read_table([stopped])
    two = run_folder(tmp_path / "two", **{"val/code/loss": 2.0})
    with pytest.raises(BadTable, match="val/code/loss, val/words/loss"):
        read_table([two])
    assert read_table([two], loss="val/code/loss").loss.tolist() == [2.0]
    with pytest.raises(BadTable, match="never logged"):
        read_table([two], loss="val/none/loss")
    (two / "exit.json").unlink()
    with pytest.raises(BadTable, match="still running"):
        read_table([two], loss="val/code/loss")


def test_files_and_options_that_do_not_go_together(tmp_path: Path, runs: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with pytest.raises(InputError, match="choose rows of a csv file"):
        read_table([folder], where={"a": ("b",)})
    with pytest.raises(InputError, match="several files"):
        read_table([runs, runs])
    with pytest.raises(InputError, match="--map loss=COLUMN"):
        read_table([runs], loss="val/x/loss")
    with pytest.raises(InputError, match="no column 'M'"):
        read_table([folder], {"N": "M"})
