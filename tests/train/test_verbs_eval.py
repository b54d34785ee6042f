"""megascale eval and load_run: the loss is that of the trainer, every token counts once, and what does not fit is named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megascale.cli import main
from megascale.config.errors import InputError
from megascale.data.batches import IGNORED, SequenceSet
from megascale.data.corpus import Split
from megascale.observe.sinks import read_metrics
from megascale.train.evaluate import SlidingWindows, evaluate, text_sequences
from megascale.train.load_run import LoadedRun, load_run


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> LoadedRun:
    return load_run(tiny_run)


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "copied"))


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Documents of 1 to 9 tokens laid end to end."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda found: sum(found) > 1))
    ids = np.arange(1, sum(lengths) + 1)  # every token can be told from the others
    starts = np.cumsum([0, *lengths[:-1]])
    return Split("made", ids, starts, None, len(ids), True)


@given(splits(), st.integers(2, 8), st.data(), st.sampled_from(["document", "causal"]))
def test_sliding_windows_score_every_token_once_with_enough_context(
    split: Split, length: int, data: st.DataObject, attention
) -> None:
    stride = data.draw(st.integers(1, length))
    windows = SlidingWindows("made", split, length, attention, 1000, True, stride)
    rows = windows.rows(np.arange(len(windows)))
    scored = rows.labels != IGNORED
    assert sorted(rows.labels[scored]) == list(range(2, split.length + 1))
    for row, column in np.argwhere(scored):
        assert rows.labels[row, column] == rows.tokens[row, column] + 1
        if row:
            assert column + 1 > length - stride
        if attention == "document":
            document = split.documents_at(rows.tokens[row, column] - 1)
            assert rows.positions[row, column] == min(column, rows.tokens[row, column] - 1 - split.starts[document])


@given(splits(), st.integers(2, 8), st.sampled_from(["document", "causal"]))
def test_a_stride_of_the_whole_window_is_no_overlap(split: Split, length: int, attention) -> None:
    plain = SequenceSet("made", split, length, attention, 1000, True)
    windows = SlidingWindows("made", split, length, attention, 1000, True, length)
    everything = np.arange(len(plain))
    assert len(windows) == len(plain)
    for name in ("tokens", "labels", "positions", "documents"):
        np.testing.assert_array_equal(getattr(windows.rows(everything), name), getattr(plain.rows(everything), name), name)


def test_the_loss_is_the_one_that_training_recorded(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in (record for record in read_metrics(tiny_run / "metrics.jsonl") if "val/words/loss" in record):
        found = output(["eval", str(tiny_run), "--step", str(record["step"]), "--sequences", "4", "--json"], capsys)
        assert found["results"]["words"]["loss"] == pytest.approx(record["val/words/loss"], rel=1e-9)
        assert found["results"]["words"]["bits_per_byte"] == pytest.approx(record["val/words/bits_per_byte"], rel=1e-9)


def test_all_held_out_text_is_scored_and_units_agree(run: LoadedRun) -> None:
    held_out = run.data.validation["words"]
    found = evaluate(run, held_out, None, None)
    manifest = json.loads((run.folder.parent / "words" / "manifest.json").read_text())
    assert found["tokens"] == held_out.split.length - 1
    assert found["bytes"] == manifest["splits"]["validation"]["bytes"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] * found["bytes"] * math.log(2) == pytest.approx(found["loss"] * found["tokens"])


def test_a_strided_loss_is_the_mean_over_single_tokens_each_with_its_own_window(run: LoadedRun, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("def alpha(self):\n    return 7\n" * 8)
    sequences = text_sequences(run, tmp_path / "long.txt")
    ids = torch.from_numpy(np.array(sequences.split.ids))
    losses = []
    for target in range(1, len(ids)):
        seen = ids[max(target - 32, 0) : target][None]
        positions = torch.arange(seen.shape[1])[None]
        logits = run.decoder(seen, positions, torch.zeros_like(positions))[0, -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[target])))
    assert len(ids) > 64
    assert evaluate(run, sequences, None, 1)["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_text_files_are_scored_whole(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "def délta(self):\n    return 3\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = output(["eval", str(tiny_run), "--text", str(tmp_path / "a.txt"), "--json"], capsys)
    assert found["results"][str(tmp_path / "a.txt")]["bytes"] == len(text.encode())
    assert main(["eval", str(tiny_run), "--text", str(tmp_path / "a.txt")]) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_bf16_weights_give_nearly_the_same_loss(tiny_run: Path, run: LoadedRun) -> None:
    rounded = load_run(tiny_run, precision="bf16")
    assert rounded.decoder.embedding.weight.dtype == torch.bfloat16
    assert rounded.decoder.norm.weight.dtype == torch.float32
    exact, found = (evaluate(one, one.data.validation["words"], 4, None)["loss"] for one in (run, rounded))
    assert found == pytest.approx(exact, rel=1e-2)
    assert found != exact


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["--step", "3"], "--step"),
        (["--source", "others"], "--source"),
        (["--sequences", "none"], "--sequences"),
        (["--stride", "33"], "--stride"),
        (["--text", "/nowhere"], "/nowhere"),
    ],
)
def test_what_does_not_exist_is_named(
    tiny_run: Path, arguments: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_run), *arguments]) == 2
    assert place in capsys.readouterr().err


def test_no_run_and_no_checkpoint_are_told_apart(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        load_run(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a run folder"):
        load_run(tmp_path)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint yet"):
        load_run(copied)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers: 2", "layers: 3", r"lacks the weight layers\.2\."),
        ("layers: 2", "layers: 1", r"does not have: layers\.1\."),
        (
            "prefix_tokens: 4",
            "prefix_tokens: 5",
            r"layers\.0\.attention\.prefix_k has shape \(2, 2, 4, 16\), the model's has \(2, 2, 5, 16\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(copied: Path, old: str, new: str, message: str) -> None:
    config = (copied / "config.yaml").read_text()
    assert old in config
    (copied / "config.yaml").write_text(config.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_run(copied)


def test_a_damaged_newest_checkpoint_is_passed_over_but_not_when_asked_for(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next((copied / "checkpoints" / "step-00000004").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert load_run(copied).step == 2
    assert "step-00000004 is not used" in capsys.readouterr().err
    with pytest.raises(InputError, match="damaged"):
        load_run(copied, 4)
