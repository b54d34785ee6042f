"""A run that starts from another model: what is taken over, what is new, what stays frozen, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from corpora import VOCABULARY
from layouts import full_unless, reproducible, saved
from megascale.checkpoint.hugging_face.import_folder import import_folder, is_import
from megascale.cli import main
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.data.batches import MicroBatch
from megascale.observe.metrics import Record
from megascale.train.inherit import inherit
from megascale.train.load_run import load_model
from megascale.train.source import open_source
from megascale.train.start import InheritedTensors, recorded
from runs import Run, losses, pretrain, tiny_config, train_phases_on_rank, train_tiny, write_config
from starts import BLOCKS, EXPERTS, FAMILIES, STREAMS, save_foreign, started

TRUNK = "layers.0.attention.q.weight"


def is_new(name: str) -> bool:
    return "prefix" in name or "aggregator" in name


def foreign_loss(model: nn.Module, batch: MicroBatch) -> float:
    logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).item()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> tuple[Path, nn.Module]:
    """A Qwen2 of transformers: its folder and itself."""
    folder = tmp_path_factory.mktemp("hf") / "qwen"
    return folder, save_foreign(folder, tiny_corpus)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("added", [(), (EXPERTS,), (BLOCKS,), (EXPERTS, "model.experts.shared=1", BLOCKS)], ids=str)
def test_the_first_loss_is_the_other_models(tmp_path: Path, tiny_corpus: Path, family: str, added: tuple[str, ...]) -> None:
    """Experts as copies, blocks at the identity, shared experts that add nothing: the model computes what it came from."""
    model = save_foreign(tmp_path / "hf", tiny_corpus, family)
    run = train_tiny(started(tmp_path, tiny_corpus, tmp_path / "hf", *added, "schedule.steps=1", family=family))
    batch = run.trainer.parts.data.train.sequences(range(4))
    assert losses(run.records, "train/lm_loss")[0][0] == pytest.approx(foreign_loss(model, batch), rel=2e-6)
    assert any("its first loss is that of the model there" in line for line in run.said)


def test_the_trunk_comes_from_there_and_the_streams_from_the_seed(
    tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]
) -> None:
    run = Run(started(tmp_path, tiny_corpus, hf[0], STREAMS))
    fresh = Run(tiny_config(tmp_path, tiny_corpus, "run.name=fresh", "model.qkv_bias=true", STREAMS))
    there = load_model(hf[0]).decoder
    for name, weight in run.weights.items():
        assert torch.equal(weight, fresh.weights[name] if is_new(name) else there.get_parameter(name)), name
    assert {group.name for group in run.trainer.engine.groups if group.new} == {"prefixes_new", "matrices_new", "scalars_new"}
    assert any("the prefixes of its 2 streams are random" in line for line in run.said)
    assert run.trainer.progress.step == 0


def test_bf16_has_the_exact_masters(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    run = Run(started(tmp_path, tiny_corpus, hf[0], STREAMS, "precision=bf16"))
    there = load_model(hf[0]).decoder.get_parameter(TRUNK)
    assert torch.equal(run.weights[TRUNK], there)
    assert torch.equal(run.trainer.engine.parameters[TRUNK], there.to(torch.bfloat16))


def test_a_frozen_trunk_keeps_every_bit_and_costs_no_state(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    settings = (STREAMS, "start.freeze=true", "schedule.steps=30", "optimizer.lr=0.02", "checkpoint.keep_last=9")
    run = Run(started(tmp_path, tiny_corpus, hf[0], *settings))
    before = run.weights
    run.train()
    for name, weight in run.weights.items():
        assert torch.equal(weight, before[name]) == (not is_new(name)), name
    trunk = [parameter for name, parameter in run.trainer.engine.parameters.items() if not is_new(name)]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trunk)
    state = {name for name in saved(run.folder / "checkpoints/step-00000030") if name.startswith("adamw")}
    assert state and all(is_new(name) for name in state)
    found = losses(run.records, "train/lm_loss")
    assert sum(found[-1][0:1]) < found[0][0]


FROZEN_WITH = {
    "bf16": ("precision=bf16",),
    "bf16, recomputed": ("precision=bf16", "parallel.recompute=layer"),
    "Muon": ("optimizer.name=muon",),
    "layers recomputed": ("parallel.recompute=layer",),
    "streams recomputed": ("parallel.recompute=stream",),
    "compiled": ("compile=on",),
    "compiled, recomputed": ("compile=on", "parallel.recompute=layer"),
    "two phases": ("schedule={phases: [{steps: 1, streams: 2}, {steps: 2, streams: 3}]}",),
    "blocks": (BLOCKS,),
}


@pytest.mark.parametrize("name", full_unless([name for name in FROZEN_WITH if "compiled" not in name], FROZEN_WITH))
def test_a_trunk_stays_frozen_with(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module], name: str) -> None:
    """Only what is new learns, and recomputation leaves the run as it is, to the bit."""
    settings = (STREAMS, "start.freeze=true", "checkpoint={every: 1, keep_last: 9}", "batch={sequences: 8, micro_batches: 2}")
    config = started(tmp_path, tiny_corpus, hf[0], *settings, *FROZEN_WITH[name])
    records = run_phases(config)
    weights = saved(tmp_path / "runs" / config.run.name / "checkpoints/step-00000003", "model/")
    trunk = load_model(hf[0]).decoder.named_parameters()
    assert [key for key, weight in trunk if not torch.equal(weight, weights[f"model/{key}"])] == []
    found = losses(records, "train/lm_loss")
    assert len(found) == 3 and found[-1][0] < found[0][0]
    if name in ("layers recomputed", "streams recomputed"):
        plain = run_phases(started(tmp_path, tiny_corpus, hf[0], *settings, "run.name=plain"))
        assert losses(plain, "train/lm_loss") == found


def test_flops_of_a_frozen_trunk_leave_out_its_gradients(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    flops = []
    for freeze in ("false", "true"):
        run = train_tiny(started(tmp_path, tiny_corpus, hf[0], STREAMS, f"start.freeze={freeze}", f"run.name=freeze-{freeze}"))
        flops.append(run.records[-1]["flops_total"])
    assert 0.6 < flops[1] / flops[0] < 0.8


@pytest.mark.parametrize("freeze", ["false", "true"])
def test_a_resume_does_not_need_the_other_model(
    tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module], freeze: str
) -> None:
    shutil.copytree(hf[0], tmp_path / "hf")
    settings = (STREAMS, f"start.freeze={freeze}", "schedule.steps=4", "checkpoint.keep_last=9")
    whole = train_tiny(started(tmp_path, tiny_corpus, tmp_path / "hf", *settings, "run.name=whole"))
    config = started(tmp_path, tiny_corpus, tmp_path / "hf", *settings)
    half = Run(config)
    half.stop_after = 2
    assert half.train() == "stop"
    shutil.rmtree(tmp_path / "hf")
    rest = train_tiny(config)
    assert reproducible(half.records + rest.records) == reproducible(whole.records)
    one, two = (saved(run.folder / "checkpoints/step-00000004") for run in (whole, rest))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_run_starts_from_a_run(tmp_path: Path, tiny_corpus: Path) -> None:
    """Its losses so far are known when the corpora are the same: then the bump is too."""
    first = train_tiny(tiny_config(tmp_path, tiny_corpus, "schedule.steps=12"))
    before = first.weights
    second = tiny_config(tmp_path, tiny_corpus, f"start.model={first.folder}", "run.name=second", STREAMS)
    run = Run(second)
    assert all(torch.equal(run.weights[name], weight) for name, weight in before.items())
    run.train()
    recent = [loss for (loss,) in losses(first.records, "train/lm_loss")][-10:]
    loss = run.records[0]["train/lm_loss"]
    assert run.records[0]["phase/loss_bump"] == pytest.approx(loss - sum(recent) / 10)
    state = json.loads((run.folder / "checkpoints/step-00000006/state.json").read_text())
    assert (state["start"]["path"], state["start"]["step"]) == (str(first.folder), 12)


def test_the_digest_is_of_the_weights_wherever_they_are(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    import_folder(hf[0], tmp_path / "imported")
    digests = []
    for name in (str(hf[0]), str(tmp_path / "imported")):
        run = Run(started(tmp_path, tiny_corpus, Path(name), f"run.name=from-{Path(name).name}"))
        run.save()
        digests.append(recorded(run.folder)["digest"])
    origin = recorded(tmp_path / "imported")
    assert digests == [origin["digest"]] * 2


def test_a_rectangle_of_experts_is_one_of_the_dense_matrix(tiny_corpus: Path, tmp_path: Path, hf: tuple[Path, nn.Module]) -> None:
    """Also one that begins inside a matrix, as ZeRO's partitions do."""
    config = started(tmp_path, tiny_corpus, hf[0], EXPERTS, f"model.vocab_size={VOCABULARY}")
    with open_source(hf[0]) as source:
        tensors = InheritedTensors(source.tensors, inherit(source.model, config.model))
        dense = source.tensors.read("model/layers.1.feed_forward.down.weight")
    whole = tensors.read("model/layers.1.feed_forward.down")
    assert torch.equal(whole, dense.expand(4, -1, -1))
    assert torch.equal(tensors.read("model/layers.1.feed_forward.down", (1, 5, 7), (2, 3, 4)), whole[1:3, 5:8, 7:11])


def run_phases(config: Config, stop_after: int = 0) -> list[Record]:
    return train_phases_on_rank(0, 1, config.model_dump(), stop_after)


def refusal(*arguments: object, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        Run(started(*arguments, **settings))
    return str(caught.value)


REFUSED = {
    "another width": ("model={width: 64, layers: 2, heads: 4, kv_heads: 2, ffn_width: 64, qkv_bias: true}", "model.width=32"),
    "another depth": ("model.layers=3", "model.layers is 3, the model there has 2"),
    "another rotary base": ("model.rotary.theta=5000.0", "model.rotary.theta is 5000.0, the model there has 10000.0"),
    "biases": ("model.qkv_bias=false", "model.qkv_bias is False, the model there has True"),
    "tied embeddings": ("model.tie_embeddings=true", "model.tie_embeddings is True, the model there has False"),
    "more rows of the vocabulary": (f"model.vocab_size={VOCABULARY + 8}", f"set model.vocab_size={VOCABULARY}"),
    "narrower experts": ("model.experts={count: 4, per_token: 2, width: 32}", "model.experts.width: 32 is not the dense"),
    "nothing new": ("start.freeze=true", "all would be frozen"),
    "wide blocks": ("model.altup={blocks: 2, form: wide}", "can then not be taken over"),
    "a step": ("start.step=3", "has no steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_because_of(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module], what: str) -> None:
    override, message = REFUSED[what]
    assert message in refusal(tmp_path, tiny_corpus, hf[0], override)


def test_routers_over_equal_experts_are_not_trained_alone(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    assert "nothing for them to learn" in refusal(tmp_path, tiny_corpus, hf[0], EXPERTS, "start.freeze=true")


def test_streams_and_experts_are_not_removed_or_changed(tmp_path: Path, tiny_corpus: Path) -> None:
    streams = "model.streams={count: 4, prefix_tokens: 4}"
    first = train_tiny(tiny_config(tmp_path, tiny_corpus, "schedule.steps=2", streams, EXPERTS))

    def message(*overrides: str) -> str:
        config = tiny_config(tmp_path, tiny_corpus, f"start.model={first.folder}", "run.name=second", *overrides)
        with pytest.raises(InputError) as caught:
            Run(config)
        return str(caught.value)

    assert "streams can be added, not removed" in message(STREAMS, EXPERTS)
    assert "model.experts.count is 8, the model there has 4" in message(streams, EXPERTS.replace("4", "8"))
    assert "model.experts.count is 1, the model there has 4" in message(streams)
    assert "prefix_tokens is 8, the model there has 4" in message(streams.replace("tokens: 4", "tokens: 8"), EXPERTS)


def test_tokens_may_be_left_out_but_not_taken_in_again(tmp_path: Path, tiny_corpus: Path) -> None:
    """Sequence-AltUp has the tensors of the plain model, and does not compute what it computes."""
    deep = ("model.layers=3", "schedule.steps=2")
    plain = train_tiny(tiny_config(tmp_path, tiny_corpus, *deep)).folder
    strided = (*deep, "model.altup={form: sequence}")
    run = train_tiny(tiny_config(tmp_path, tiny_corpus, *strided, f"start.model={plain}", "run.name=strided"))
    assert "its first loss is not that of the model there: most layers compute on one of 4 tokens" in run.said
    with pytest.raises(InputError, match="model.altup.form is recycled, the model there has sequence"):
        Run(tiny_config(tmp_path, tiny_corpus, *deep, f"start.model={run.folder}", "run.name=again"))


def test_more_streams_than_there_begin_anew(tmp_path: Path, tiny_corpus: Path) -> None:
    first = train_tiny(tiny_config(tmp_path, tiny_corpus, "schedule.steps=2", STREAMS))
    more = "model.streams={count: 4, prefix_tokens: 4}"
    run = Run(tiny_config(tmp_path, tiny_corpus, f"start.model={first.folder}", "run.name=second", more))
    assert torch.equal(run.weights[TRUNK], first.weights[TRUNK])
    assert any("of its 2 streams are not taken over" in line for line in run.said)


def test_a_missing_tensor_is_named(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    shutil.copytree(hf[0], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refusal(tmp_path, tiny_corpus, tmp_path / "hf")


def test_another_tokenizer_is_refused(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    shutil.copytree(hf[0], tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    one, two = by_id[40], by_id[41]
    vocabulary[one], vocabulary[two] = 41, 40
    path.write_text(json.dumps(content))
    message = refusal(tmp_path, tiny_corpus, tmp_path / "hf")
    assert f"id 40 is {one!r} there and {two!r} in the model's" in message
    assert "prepare the corpora with --tokenizer" in message


def test_a_folder_that_is_no_model(tmp_path: Path, tiny_corpus: Path) -> None:
    assert "no such folder" in refusal(tmp_path, tiny_corpus, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither config.yaml nor config.json" in refusal(tmp_path, tiny_corpus, tmp_path / "empty")


def test_a_run_does_not_change_the_model_it_came_from(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    train_tiny(started(tmp_path, tiny_corpus, hf[0], STREAMS))
    assert "start.freeze: False -> True" in refusal(tmp_path, tiny_corpus, hf[0], STREAMS, "start.freeze=true")


def test_phases_may_add_the_streams_later(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    """The first phase is the other model as it was, the second adds to it; a resume in the second needs it no more."""
    shutil.copytree(hf[0], tmp_path / "hf")
    phases = "schedule={phases: [{steps: 2, streams: 1, shape: constant}, {steps: 3, shape: constant}]}"
    settings = (STREAMS, phases, "checkpoint.keep_last=9")
    whole = run_phases(started(tmp_path, tiny_corpus, tmp_path / "hf", *settings, "run.name=whole"))
    batch = Run(started(tmp_path, tiny_corpus, hf[0], "run.name=probe")).trainer.parts.data.train.sequences(range(4))
    assert whole[0]["train/lm_loss"] == pytest.approx(foreign_loss(hf[1], batch), rel=2e-6)
    assert "phase/loss_bump" in whole[2]
    config = started(tmp_path, tiny_corpus, tmp_path / "hf", *settings)
    half = run_phases(config, 4)
    shutil.rmtree(tmp_path / "hf")
    assert reproducible(half + run_phases(config)) == reproducible(whole)


def test_a_frozen_trunk_with_phases_stays_frozen(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    phases = "schedule={phases: [{steps: 2, shape: constant}, {steps: 2, shape: constant, lr_scale: 0.5}]}"
    settings = (STREAMS, phases, "start.freeze=true", "checkpoint={every: 2, keep_last: 9}")
    run_phases(started(tmp_path, tiny_corpus, hf[0], *settings))
    there = load_model(hf[0]).decoder
    end = saved(tmp_path / "runs/tiny/checkpoints/step-00000004", "model/")
    for name, weight in there.named_parameters():
        assert torch.equal(end[f"model/{name}"], weight), name
    late = "schedule={phases: [{steps: 2, streams: 1}, {steps: 2}]}"
    assert "the first phase adds nothing" in refusal(
        tmp_path, tiny_corpus, hf[0], STREAMS, late, "start.freeze=true", "run.name=b"
    )


def test_a_group_that_matches_frozen_parameters_alone_is_refused(
    tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]
) -> None:
    group = 'optimizer.groups=[{pattern: "*.q.weight", lr_scale: 0.5}]'
    assert "matches only parameters" in refusal(tmp_path, tiny_corpus, hf[0], STREAMS, group, "start.freeze=true")


def test_imported_weights_and_another_start_exclude_each_other(
    tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]
) -> None:
    import_folder(hf[0], tmp_path / "runs/tiny")
    assert "holds imported weights already" in refusal(tmp_path, tiny_corpus, hf[0])


def test_a_checkpoint_of_step_0_is_an_import_only_if_it_was_imported(
    tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]
) -> None:
    run = Run(started(tmp_path, tiny_corpus, hf[0]))
    run.save()
    import_folder(hf[0], tmp_path / "imported")
    assert not is_import(run.folder)
    assert is_import(tmp_path / "imported") and is_import(tmp_path / "imported", 0) and not is_import(tmp_path / "imported", 3)
    assert type(load_model(run.folder)).__name__ == "LoadedRun"


def test_start_settings_without_a_model_have_no_effect(tmp_path: Path, tiny_corpus: Path) -> None:
    for override in ("start.step=3", "start.freeze=true", "start.new_warmup_steps=5"):
        with pytest.raises(InputError, match="start.model is null"):
            check(load_config(write_config(tmp_path, tiny_corpus), [override]))


def test_the_result_is_exported_in_the_published_format(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    """Streams on a Qwen2 are the published ParScale models; the tokenizer of the start comes along."""
    run = train_tiny(started(tmp_path, tiny_corpus, hf[0], STREAMS))
    assert main(["convert", str(run.folder), str(tmp_path / "out"), "--to", "hf"]) == 0
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["model_type"], values["parscale_n"], values["eos_token_id"]) == ("qwen2_parscale", 2, 0)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (hf[0] / "tokenizer.json").read_bytes()
    back = load_model(tmp_path / "out").decoder
    assert all(torch.equal(back.get_parameter(name), weight) for name, weight in run.weights.items())


def test_the_model_section_of_a_trained_model_can_be_included(
    tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny(started(tmp_path, tiny_corpus, hf[0], STREAMS))
    for place in (hf[0], run.folder):
        capsys.readouterr()
        assert main(["config", "model", str(place)]) == 0
        (tmp_path / "model.yaml").write_text(capsys.readouterr().out)
        config = load_config(tmp_path / "model.yaml").config
        assert resolve(config).model == load_model(place).config.model


@pytest.mark.slow
def test_the_command_starts_resumes_and_says_where_from(tmp_path: Path, tiny_corpus: Path, hf: tuple[Path, nn.Module]) -> None:
    shutil.copytree(hf[0], tmp_path / "hf")
    config = write_config(tmp_path, tiny_corpus)
    settings = ("model.qkv_bias=true", STREAMS, f"start.model={tmp_path / 'hf'}", "start.freeze=true", "start.new_warmup_steps=4")
    assert main(["train", "--config", str(config), "--dry-run", *settings, f"model.vocab_size={VOCABULARY}"]) == 0
    done = pretrain(config, *settings)
    assert done.returncode == 0, done.stderr
    assert "27 tensors are taken over, 8 are new" in done.stderr
    assert "only what is new is trained" in done.stderr
    manifest = json.loads((tmp_path / "runs/tiny/manifest.json").read_text())["start"]
    assert manifest["path"] == str(tmp_path / "hf") and len(manifest["digest"]) == 32
    rates = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert rates[0]["optim/lr/prefixes_new"] == pytest.approx(0.01 / 2 / 4)
    shutil.rmtree(tmp_path / "hf")
    again = pretrain(config, *settings)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "runs/tiny/manifest.json").read_text())["start"] == manifest
    wrong = pretrain(config, *settings, "run.name=other")
    assert wrong.returncode == 2
    assert "there is no such folder" in wrong.stderr
    assert json.loads((tmp_path / "runs/other/exit.json").read_text())["reason"] == "bad_input"
