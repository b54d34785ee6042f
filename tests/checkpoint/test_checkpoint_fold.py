"""Networks that made the prefixes are folded into them once: evaluation, generation and export see a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megascale.checkpoint.fold import folded
from megascale.checkpoint.hugging_face.folder import open_hugging_face
from megascale.checkpoint.hugging_face.tensors import parameter_shapes
from megascale.checkpoint.layout import full
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.weights import WEIGHTS, check_weights
from megascale.cli import main
from megascale.train.load_run import load_model, load_run
from megascale.train.stream_sets import open_set
from runs import Run, tiny_config, train_tiny
from tiny import packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[9, 5], [14]])
NETWORK = {"streams": {"count": 3, "prefix_tokens": 4, "reparameterise": 6}, "qkv_bias": True}


def checkpoint(folder: Path) -> tuple[CheckpointReader, torch.nn.Module]:
    decoder = tiny_decoder(tiny_model(**NETWORK), spread=0.2)
    rectangles = [full(WEIGHTS + name, parameter.detach()) for name, parameter in decoder.named_parameters()]
    path = save_checkpoint(folder, 3, rectangles, {}, rank=0, world=1, gather=lambda one: [one], barrier=lambda: None)
    return CheckpointReader(path), decoder


def test_a_folded_checkpoint_holds_the_plain_model_with_the_prefixes_that_were_made(tmp_path: Path) -> None:
    reader, decoder = checkpoint(tmp_path)
    whole, model = folded(reader, decoder.config)
    assert model == tiny_model(**{**NETWORK, "streams": {"count": 3, "prefix_tokens": 4}})
    check_weights(whole, parameter_shapes(model))
    for name, layer in decoder.layers.items():
        for kind, made in zip("kv", layer.attention.prefixes(), strict=True):
            key = f"{WEIGHTS}layers.{name}.attention.prefix_{kind}"
            assert torch.equal(whole.read(key), made.detach())
            assert torch.equal(whole.read(key, (1, 0, 2, 0), (1, 2, 2, 8)), made.detach()[1:2, :, 2:4])
    assert torch.equal(whole.read(f"{WEIGHTS}norm.weight"), decoder.norm.weight.detach())


def test_a_model_without_networks_is_read_as_it_is(tmp_path: Path) -> None:
    reader, _ = checkpoint(tmp_path)
    model = tiny_model(streams={"count": 3})
    assert folded(reader, model) == (reader, model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_evaluated_and_exported_with_folded_prefixes(tmp_path: Path, tiny_corpus: Path, precision: str) -> None:
    streams = "model.streams={count: 2, prefix_tokens: 4, reparameterise: 6}"
    run = train_tiny(tiny_config(tmp_path, tiny_corpus, streams, "model.qkv_bias=true", f"precision={precision}"))
    (trained,) = run.trainer.stages.modules()
    if precision == "bf16":  # fp32 masters are what is saved
        trained.float().load_state_dict(run.weights)
    loaded = load_run(run.folder)
    assert loaded.config.model.streams.reparameterise is None
    assert "layers.0.attention.prefix_k" in dict(loaded.decoder.named_parameters())
    batch = packed_batch([[9, 5], [14]], vocab_size=loaded.config.model.vocab_size)
    with torch.no_grad():
        expected = trained.eval()(*batch.inputs)
        torch.testing.assert_close(loaded.decoder(*batch.inputs), expected, rtol=1e-4, atol=1e-5)
        assert main(["convert", str(run.folder), str(tmp_path / "hf"), "--to", "hf"]) == 0
        assert open_hugging_face(tmp_path / "hf").family.model_type == "qwen2_parscale"
        found = load_model(tmp_path / "hf").decoder(*batch.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # and the run itself goes on with its networks
    assert any(".prefix_network." in name for name in run.weights)


def test_others_start_from_the_folded_run(tmp_path: Path, tiny_corpus: Path) -> None:
    plain = "model.streams={count: 2, prefix_tokens: 4}"
    run = train_tiny(tiny_config(tmp_path, tiny_corpus, plain, "model.streams.reparameterise=6"))
    made = load_run(run.folder).decoder
    other = Run(tiny_config(tmp_path, tiny_corpus, plain, "run.name=next", f"start.model={run.folder}"))
    assert other.weights.keys() == {name for name, _ in made.named_parameters()}
    assert all(torch.equal(weight, made.get_parameter(name)) for name, weight in other.weights.items())
    taken = open_set(run.folder)
    assert taken.streams.reparameterise is None
    assert all(torch.equal(tensor, made.get_parameter(name)) for name, tensor in taken.tensors.items())
