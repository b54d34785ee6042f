"""megascale convert, and eval, generate and train on what comes from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn

from corpora import VOCABULARY
from foreign import Case
from megascale.cli import main
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.data.open_data import open_source
from megascale.train.load_run import load_model, load_run
from megascale.train.run_folder import open_run_folder
from megascale.train.sampling import SamplingOptions, generate
from runs import Run, losses

TEXT = "one small stream learns , and the red block reads .\n" * 6


def save_with_tokenizer(folder: Path, corpus: Path, start: bool = True, **config: object) -> nn.Module:
    """A tiny Qwen2 with the corpus's tokenizer, which puts a token before each text if `start`."""
    model = Case("Qwen2", {"vocab_size": VOCABULARY, "eos_token_id": 0, **config}).save(folder)
    path = open_source(str(corpus), 0.0).tokenizer
    assert path is not None
    tokenizer = Tokenizer.from_file(str(path))
    if start:
        name = tokenizer.id_to_token(0)
        tokenizer.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def ids(folder: Path, text: str) -> torch.Tensor:
    return torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids])


@pytest.fixture
def hf(tmp_path: Path, tiny_corpus: Path) -> tuple[Path, nn.Module]:
    """A folder and its model."""
    return tmp_path / "hf", save_with_tokenizer(tmp_path / "hf", tiny_corpus)


def convert(source: Path, target: Path, to: str, *options: str) -> None:
    assert main(["convert", str(source), str(target), "--to", to, *options]) == 0


@pytest.mark.parametrize("imported", [False, True], ids=["folder", "import"])
def test_eval_scores_a_text_as_transformers_does(
    imported: bool, hf: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = hf
    (tmp_path / "text.txt").write_text(TEXT)
    if imported:
        convert(folder, tmp_path / "run", "run")
        folder = tmp_path / "run"
    capsys.readouterr()
    assert main(["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--sequence-length", "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"][str(tmp_path / "text.txt")]
    tokens = ids(hf[0], TEXT)
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss.item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == tokens.shape[1] - 1
    assert found["bytes"] == len(TEXT.encode())


def test_eval_cuts_texts_into_windows_of_the_given_length(
    hf: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    found = {}
    for length in ("16", "64"):
        assert main(["eval", str(hf[0]), "--text", str(tmp_path / "text.txt"), "--sequence-length", length, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["sequence_length"] == int(length)
        found[length] = next(iter(document["results"].values()))
    assert found["16"]["tokens"] == found["64"]["tokens"]
    assert found["16"]["loss"] != found["64"]["loss"]


@pytest.mark.parametrize("imported", [False, True], ids=["folder", "import"])
def test_generate_continues_as_transformers_does(
    imported: bool, hf: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = hf
    if imported:
        convert(folder, tmp_path / "run", "run")
        folder = tmp_path / "run"
    capsys.readouterr()
    options = ["--prompt", "the red block", "--temperature", "0", "--tokens", "12", "--json"]
    assert main(["generate", str(folder), *options]) == 0
    sample = json.loads(capsys.readouterr().out)["samples"][0]
    prompt = ids(hf[0], "the red block")
    new = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    kept = new[: new.index(0)] if 0 in new else new
    loaded = load_model(folder)
    chosen = generate(loaded.stages, prompt[0].tolist(), 1, 64, loaded.separator, SamplingOptions(tokens=12, temperature=0))
    assert [token for (token,) in chosen if token is not None and token != 0] == kept
    assert sample["tokens"] == len(new[: new.index(0) + 1] if 0 in new else new)
    tokenizer = Tokenizer.from_file(str(hf[0] / "tokenizer.json"))
    assert tokenizer.decode(kept, skip_special_tokens=False).startswith(sample["text"])  # half a letter at the end is not printed


def test_texts_start_as_the_tokenizer_starts_them(tmp_path: Path, tiny_corpus: Path) -> None:
    save_with_tokenizer(tmp_path / "with", tiny_corpus, start=True)
    save_with_tokenizer(tmp_path / "without", tiny_corpus, start=False)
    for name in ("with", "without"):
        model = load_model(tmp_path / name)
        assert model.encode("the red") == ids(tmp_path / name, "the red")[0].tolist()
        assert bool(model.start) == (name == "with")
    assert main(["generate", str(tmp_path / "without"), "--prompt", "", "--tokens", "2"]) == 2


def test_an_imported_run_is_trained_on(tmp_path: Path, tiny_corpus: Path) -> None:
    """The first loss is that of the imported weights; then the folder is an ordinary run. The corpus has the model's own tokenizer."""
    model = save_with_tokenizer(tmp_path / "hf", tiny_corpus, start=False)
    convert(tmp_path / "hf", tmp_path / "run", "run")
    overrides = [
        f"data.sources=[{{path: {tiny_corpus}}}]", "data.sequence_length=32", "batch.sequences=4", "schedule.steps=3",
        "schedule.warmup_steps=1", "compile=off", "parallel.zero_stage=0", "validation.every=0", "observe.wandb.mode=off",
    ]  # fmt: skip
    config = resolve(load_config(tmp_path / "run/config.yaml", overrides).config)
    before = load_model(tmp_path / "run")
    run = Run(config)
    assert any("resuming from step-00000000" in line for line in run.said)
    assert not any("warning" in line for line in run.said)
    batch = run.trainer.parts.data.train.sequences(range(4))
    expected = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    run.train()
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    assert losses(run.records, "train/lm_loss")[0][0] == pytest.approx(float(loss), rel=1e-5)
    assert run.records[-1]["step"] == 3
    after = load_run(tmp_path / "run")
    assert after.step == 3
    changed = after.decoder.layers["0"].attention.q.weight - before.decoder.layers["0"].attention.q.weight
    assert changed.abs().max() > 0

    convert(tmp_path / "run", tmp_path / "out", "hf")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["model_type"], values["eos_token_id"]) == ("qwen2", 0)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(back.model.layers[0].self_attn.q_proj.weight, after.decoder.layers["0"].attention.q.weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the red")["input_ids"] == after.encode("the red")[1:]


def test_imported_weights_do_not_become_another_model(hf: tuple[Path, nn.Module], tmp_path: Path, tiny_corpus: Path) -> None:
    convert(hf[0], tmp_path / "run", "run")
    overrides = [f"data.sources=[{{path: {tiny_corpus}}}]", "model.ffn_width=128", "optimizer.lr=0.5"]
    config = resolve(load_config(tmp_path / "run/config.yaml", overrides).config)
    with pytest.raises(InputError, match=r"\(model.ffn_width: 64 -> 128\)"):
        open_run_folder(config)


def test_a_run_trained_here_is_exported_with_its_tokenizer(tmp_path: Path, tiny_corpus: Path) -> None:
    from runs import tiny_config, train_tiny

    config = tiny_config(tmp_path, tiny_corpus, "schedule.steps=2", "model.streams={count: 2, prefix_tokens: 4}")
    run = train_tiny(config)
    convert(run.folder, tmp_path / "out", "hf", "--dtype", "bf16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = load_run(run.folder)
    assert loaded.encode("the red")[1:] == tokenizer("the red", add_special_tokens=False)["input_ids"]
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["eos_token_id"], values["max_position_embeddings"], values["torch_dtype"]) == (
        loaded.separator,
        32,
        "bfloat16",
    )


def test_the_verb_says_what_it_did(hf: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(hf[0], tmp_path / "run", "run", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "qwen2" and facts["tensors"] == 27 and facts["dtypes"] == ["float32"]
    convert(tmp_path / "run", tmp_path / "out", "hf")
    assert "27 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["hf", "new", "--to", "run", "--step", "3"], "--step: has no effect"),
        (["hf", "new", "--to", "run", "--dtype", "bf16"], "--dtype: has no effect"),
        (["hf", "new", "--to", "hf"], "is not a run folder"),
        (["run", "new", "--to", "run"], "is not a Hugging Face folder"),
        (["run", "new", "--to", "hf", "--shard-gb", "0"], "--shard-gb"),
        (["run", "new", "--to", "hf", "--step", "5"], "no checkpoint of step 5"),
        (["hf", "bad name", "--to", "run"], "run.name"),
        (["nowhere", "new", "--to", "run"], "is not a Hugging Face folder"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], named: str, hf: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(hf[0], tmp_path / "run", "run")
    source, target, *options = arguments
    assert main(["convert", str(tmp_path / source), str(tmp_path / target), *options]) == 2
    assert named in capsys.readouterr().err


def test_a_hugging_face_folder_has_no_steps_and_no_held_out_text(hf: tuple[Path, nn.Module]) -> None:
    with pytest.raises(InputError, match="has no steps"):
        load_model(hf[0], step=3)
    assert main(["eval", str(hf[0])]) == 2
