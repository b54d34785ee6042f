"""Several sets of streams on one frozen trunk: saved alone, used by digest, sharing the trunk's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layouts import saved
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.checkpoint.stream_set import read_set
from megascale.cli import main
from megascale.config.errors import InputError
from megascale.train.load_run import load_model
from megascale.train.stream_sets import open_set
from runs import train_tiny
from starts import save_foreign, started

NEW = ("start.freeze=true", "optimizer.lr=0.02")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """hf, a trunk; runs two and four, sets of it; all, a run that trained the trunk too."""
    folder = tmp_path_factory.mktemp("sets")
    save_foreign(folder / "hf", tiny_corpus, "Qwen2")
    for name, streams, more in (("two", 2, NEW), ("four", 4, NEW), ("all", 2, ())):
        settings = (f"model.streams={{count: {streams}, prefix_tokens: 4}}", f"run.name={name}", *more)
        train_tiny(started(folder, tiny_corpus, folder / "hf", *settings))
    return folder


def logits(model: object) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand(2, -1)
    return model.decoder(tokens, positions, torch.zeros_like(positions))


def test_the_trunk_with_a_set_is_the_run(made: Path, tmp_path: Path) -> None:
    """Whatever holds the trunk: the folder it came from, an import of it, or another run of it."""
    assert main(["streams", "save", str(made / "runs/two"), str(tmp_path / "set")]) == 0
    import_folder(made / "hf", tmp_path / "imported")
    expected = logits(load_model(made / "runs/two"))
    for trunk in (made / "hf", tmp_path / "imported", made / "runs/four"):
        assert torch.equal(logits(load_model(trunk).with_streams(open_set(tmp_path / "set"))), expected)
    assert torch.equal(logits(load_model(made / "hf").with_streams(open_set(made / "runs/two"))), expected)


def test_all_sets_share_the_trunks_memory(made: Path) -> None:
    trunk = load_model(made / "hf")
    before = logits(trunk)
    two, four = (trunk.with_streams(open_set(made / "runs" / name)) for name in ("two", "four"))
    assert [model.decoder.config.streams.count for model in (trunk, two, four)] == [1, 2, 4]
    for name, weight in trunk.decoder.named_parameters():
        assert {model.decoder.get_parameter(name).data_ptr() for model in (two, four)} == {weight.data_ptr()}
    assert torch.equal(logits(four), logits(load_model(made / "runs/four")))
    assert torch.equal(logits(trunk), before)
    assert torch.equal(logits(four.with_streams(None)), before)


def test_bf16_weights_are_checked_by_the_digest_of_the_exact_ones(made: Path) -> None:
    model = load_model(made / "hf", precision="bf16").with_streams(open_set(made / "runs/two"))
    assert model.decoder.get_parameter("layers.0.attention.prefix_k").dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(load_model(made / "runs/two", precision="bf16")))


def test_a_set_holds_nothing_of_the_trunk(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["streams", "save", str(made / "runs/four"), str(tmp_path / "set"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["streams"], facts["tensors"], facts["trunk_path"]) == (4, 8, str(made / "hf"))
    found = read_set(tmp_path / "set")
    assert all("prefix" in name or "aggregator" in name for name in found.tensors)
    weights = saved(made / "runs/four/checkpoints/step-00000003", "model/")
    assert all(torch.equal(tensor, weights[f"model/{name}"]) for name, tensor in found.tensors.items())
    assert sum(path.stat().st_size for path in (tmp_path / "set").iterdir()) == pytest.approx(facts["bytes"], abs=2000)


def test_a_set_of_another_trunk_is_refused(made: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    save_foreign(tmp_path / "llama", tiny_corpus, "Llama")
    for trunk in (tmp_path / "llama", made / "runs/all"):
        with pytest.raises(InputError, match="another trunk, of digest [0-9a-f]{32}"):
            load_model(trunk).with_streams(open_set(made / "runs/two"))
    with pytest.raises(InputError, match="another trunk"):
        load_model(made / "hf").with_streams(open_set(made / "runs/all"))


def test_the_verbs_take_a_set(made: Path, tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("one small stream learns , and the red block reads .\n" * 4)
    assert main(["streams", "save", str(made / "runs/two"), str(tmp_path / "set")]) == 0
    assert f"megascale generate {made / 'hf'} --streams" in capsys.readouterr().out
    results = []
    text = str(tmp_path / "text.txt")
    for streams in (["--streams", str(tmp_path / "set")], ["--streams", str(made / "runs/two")], []):
        run = [str(made / "hf"), *streams]
        assert main(["generate", *run, "--prompt", "the red", "--tokens", "6", "--temperature", "0"]) == 0
        capsys.readouterr()
        assert main(["eval", *run, "--text", text, "--sequence-length", "64", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["results"][text]["loss"])
    assert results[0] == results[1]
    assert abs(results[2] - results[1]) > 1e-4
    assert main(["eval", str(made / "runs/all"), "--streams", str(tmp_path / "set"), "--text", text]) == 2
    assert "another trunk" in capsys.readouterr().err


def test_a_run_without_streams_has_no_set(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["streams", "save", str(made / "hf"), str(tmp_path / "set")]) == 2
    assert "has no streams" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_run_that_trained_its_trunk_is_told_so(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["streams", "save", str(made / "runs/all"), str(tmp_path / "set")]) == 0
    assert "the trunk was trained too" in capsys.readouterr().out
    model = load_model(made / "runs/all")
    assert torch.equal(logits(model.with_streams(open_set(tmp_path / "set"))), logits(model))


@pytest.mark.parametrize("damage", ["bytes", "format", "missing", "no json"])
def test_a_damaged_set_is_refused(made: Path, tmp_path: Path, damage: str) -> None:
    assert main(["streams", "save", str(made / "runs/two"), str(tmp_path / "set")]) == 0
    tensors, description = tmp_path / "set/streams.safetensors", tmp_path / "set/streams.json"
    if damage == "bytes":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "format":
        description.write_text(description.read_text().replace('"format": 1', '"format": 2'))
    elif damage == "missing":
        tensors.unlink()
    else:
        description.write_text("[]")
    with pytest.raises(InputError, match="save the set again"):
        open_set(tmp_path / "set")
