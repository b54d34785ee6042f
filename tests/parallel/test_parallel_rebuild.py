"""Recomputed layers with K blocks: the states are built again from the updates, the same bits from less memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megascale.model.decoder import Decoder
from megascale.parallel import recompute
from megascale.parallel.meta_memory import MetaMemory
from megascale.parallel.rebuild import RebuiltLayers, rebuilding_saves
from megascale.parallel.recompute import apply_recompute
from megascale.train.compiling import keep_graph_order
from tiny import gradients, packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[40, 24], [64]])
DEEP: dict[str, Any] = {"layers": 8, "width": 16, "ffn_width": 32}


def altup(blocks: int = 4, **settings: Any) -> dict[str, Any]:
    return {"altup": {"blocks": blocks, **settings}}


MODELS: dict[str, dict[str, Any]] = {
    "static": altup(),
    "static, predicted": altup(read="predicted", select="same"),
    "token": altup(coefficients="token"),
    "token, predicted, wide": altup(coefficients="token", read="predicted", form="wide"),
    "with streams and experts": {
        **altup(),
        "streams": {"count": 2, "prefix_tokens": 4},
        "experts": {"count": 4, "per_token": 2},
    },
}


def step(decoder: Decoder) -> dict[str, Tensor]:
    losses = BATCH.losses(decoder)
    sum(losses.auxiliary.values(), losses.lm).backward()
    return gradients(decoder)


def build(model: dict[str, Any], mode: str, compiled: bool = False, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = tiny_decoder(tiny_model(**DEEP, **model), spread=0.1)
    for name, parameter in decoder.named_parameters():
        if dtype != torch.float32 and "norm" not in name and ".residual." not in name:
            parameter.data = parameter.data.to(dtype)
    apply_recompute(decoder, mode)
    for layer in decoder.layers.values() if compiled else ():
        layer.compile(backend="aot_eager")
        layer.residual.compile(backend="aot_eager")
    return decoder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rebuilt_states_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    results = []
    for mode in ("none", "layer"):
        decoder = build(MODELS[name], mode, dtype=dtype)
        assert isinstance(decoder.run_layer, RebuiltLayers) == (mode == "layer")
        results.append(step(decoder))
        decoder.zero_grad()
        assert all(torch.equal(results[-1][name], gradient) for name, gradient in step(decoder).items())
    assert [name for name, gradient in results[0].items() if not torch.equal(results[1][name], gradient)] == []


@pytest.mark.parametrize("name", MODELS)
def test_so_they_do_with_kernels(name: str) -> None:
    results = [step(build(MODELS[name], "none"))]
    decoder = build(MODELS[name], "layer")
    for layer in decoder.layers.values():
        layer.residual.fused = True
    results.append(step(decoder))
    assert [name for name, gradient in results[0].items() if not torch.equal(results[1][name], gradient)] == []


@pytest.mark.parametrize("name", ["static", pytest.param("token, predicted, wide", marks=pytest.mark.full)])
def test_so_do_compiled_layers(name: str) -> None:
    torch._dynamo.reset()
    keep_graph_order()
    with torch._dynamo.config.patch(recompile_limit=64):
        plain, compiled = step(build(MODELS[name], "none")), step(build(MODELS[name], "layer", compiled=True))
    for parameter, gradient in plain.items():
        torch.testing.assert_close(compiled[parameter], gradient, rtol=1e-4, atol=1e-6)


def bytes_of(layers: int, blocks: int, mode: str) -> tuple[int, int]:
    """Bytes alive behind the forward pass, beside the parameters, and the most in forward and backward; on meta tensors."""
    with torch.device("meta"):
        decoder = Decoder(tiny_model(**{**DEEP, "layers": layers}, **altup(blocks)))
    apply_recompute(decoder, mode)
    inputs = [torch.empty(1, 512, dtype=torch.int64, device="meta") for _ in range(4)]
    with MetaMemory([*decoder.parameters(), *inputs]) as memory:
        loss = decoder.losses(*inputs, torch.empty((), device="meta")).lm
        assert loss is not None
        kept = memory.now
        loss.backward()
    return kept, memory.peak


@pytest.mark.parametrize("blocks", [4, pytest.param(8, marks=pytest.mark.full)])
def test_each_layer_keeps_one_block_instead_of_all(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 512 * 16 * 4  # bytes of one block: tokens, width, fp32
    by_layers = [bytes_of(layers, blocks, "layer")[0] for layers in (8, 16)]
    assert by_layers[1] - by_layers[0] == pytest.approx(8 * block, rel=0.01)
    _, peak = bytes_of(16, blocks, "layer")
    monkeypatch.setattr(recompute, "rebuild_states", lambda _: False)
    usual, (_, usual_peak) = [bytes_of(layers, blocks, "layer")[0] for layers in (8, 16)], bytes_of(16, blocks, "layer")
    assert usual[1] - usual[0] == pytest.approx(8 * blocks * block, rel=0.01)
    assert peak < usual_peak


@given(layers=st.integers(1, 200), blocks=st.integers(1, 8))
def test_rebuilding_is_chosen_where_it_keeps_less(layers: int, blocks: int) -> None:
    held = 1 + math.ceil(math.log2(layers))
    assert rebuilding_saves(layers, blocks) == (layers + blocks * held < layers * blocks)
    assert not rebuilding_saves(layers, 1)


def test_a_graph_is_differentiated_once() -> None:
    decoder = build(altup(), "layer")
    loss = BATCH.losses(decoder).lm
    assert loss is not None
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="can be differentiated once"):
        loss.backward()


def test_two_passes_under_way_do_not_mix() -> None:
    """As in a pipeline: a second micro-batch goes forward before the first goes backward."""
    decoder, other = build(altup(), "layer"), packed_batch([[64], [60, 4]], seed=1)
    alone = []
    for batch in (BATCH, other):
        batch.losses(decoder).lm.backward()
        alone.append(gradients(decoder))
        decoder.zero_grad()
    first, second = BATCH.losses(decoder).lm, other.losses(decoder).lm
    for loss, expected in ((first, alone[0]), (second, alone[1])):
        loss.backward()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(decoder).items())
        decoder.zero_grad()


def test_evaluation_keeps_nothing() -> None:
    decoder = build(altup(), "layer")
    with torch.no_grad():
        found = BATCH.losses(decoder).lm
    assert isinstance(decoder.run_layer, RebuiltLayers)
    assert decoder.run_layer.chain is None
    assert torch.equal(found, BATCH.losses(build(altup(), "none")).lm.detach())
