"""Recomputation: the same bits layer by layer, the same numbers stream by stream, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megascale.model.decoder import Decoder, Losses
from megascale.model.origin import Draw
from megascale.model.routers import ROUTERS, loss_weights
from megascale.parallel.meta_memory import MetaMemory
from megascale.parallel.recompute import apply_recompute
from tiny import gradients, largest_error, packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[40, 24], [64]])
ALL = {"streams": {"count": 2, "prefix_tokens": 4}, "experts": {"count": 4, "per_token": 2}, "altup": {"blocks": 2}}


def kept_bytes(decoder: Decoder) -> int:
    """What the graph of a forward pass holds on to, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = BATCH.losses(decoder)
    assert losses.lm is not None
    return sum(found.values())


@pytest.mark.parametrize("model", [{}, ALL], ids=["plain", "all axes"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)], ids=["eager", "compiled"])
def test_recomputed_layers_give_the_same_bits_and_keep_less(model: dict, compiled: bool) -> None:
    results, kept = [], []
    for mode in ("none", "layer"):
        decoder = tiny_decoder(tiny_model(layers=4, **model), spread=0.1)
        apply_recompute(decoder, mode)
        if compiled:
            for layer in decoder.layers.values():
                layer.compile()
        losses = BATCH.losses(decoder)
        sum(losses.auxiliary.values(), losses.lm).backward()
        results.append(gradients(decoder))
        kept.append(kept_bytes(decoder))
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[0].items())
    assert kept[1] < kept[0] / 3


# Stream by stream -----------------------------------------------------------------------------------------------------


def step(
    mode: str, compiled: bool = False, dtype: torch.dtype = torch.float64, **model: object
) -> tuple[Losses, dict[str, Tensor]]:
    """Losses and gradients of a micro-batch, with the weights of every loss, on a later step whose draws are not those of step 0."""
    decoder = tiny_decoder(tiny_model(**model), spread=0.1).to(dtype)
    apply_recompute(decoder, mode)
    for layer in decoder.layers.values() if compiled else ():
        layer.compile()
    count = torch.tensor(1 / int((BATCH.labels >= 0).sum()), dtype=dtype)
    losses = decoder.losses(*BATCH.inputs, BATCH.labels, count, Draw(seed=3, step=7, sample=2))
    weights = loss_weights(decoder.config.experts)
    sum((weights[name] * loss for name, loss in {**losses.auxiliary, **losses.rewarded}.items()), losses.lm).backward()
    return losses, gradients(decoder)


EXPERTS = {"count": 4, "per_token": 2, "shared": 1}
STREAM_MODELS = {
    "dense": {},
    "altup": {"altup": {"blocks": 3}},
    "window": {"sliding_window": 5, "qk_norm": True, "qkv_bias": True},
    "network": {"reparameterise": 6},
    "capacity": {"experts": {**EXPERTS, "capacity_factor": 0.8}},
    **{router: {"experts": {**EXPERTS, "router": router}, "altup": {"blocks": 2}} for router in ROUTERS},
}


@pytest.mark.parametrize("settings", STREAM_MODELS.values(), ids=STREAM_MODELS)
def test_streams_one_after_the_other_are_the_streams_together(settings: dict) -> None:
    settings = dict(settings)
    network = settings.pop("reparameterise", None)
    settings["streams"] = {"count": 3, "prefix_tokens": 4, "reparameterise": network}
    (together, expected), (apart, found) = step("none", **settings), step("stream", **settings)
    assert all(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert largest_error(found[name], gradient) < 1e-9, name
    torch.testing.assert_close(apart.lm, together.lm, rtol=1e-13, atol=0)
    for kind in ("auxiliary", "rewarded", "statistics"):
        ours, theirs = getattr(apart, kind), getattr(together, kind)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # router arithmetic is fp32
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(apart.stream_similarity, together.stream_similarity)


@pytest.mark.full
def test_compiled_streams_one_after_the_other() -> None:
    settings = {**ALL, "streams": {"count": 3, "prefix_tokens": 4}}
    (_, expected), (_, found) = (step(mode, True, torch.float32, **settings) for mode in ("none", "stream"))
    for name, gradient in expected.items():
        assert largest_error(found[name], gradient) < 1e-4, name


def test_in_evaluation_nothing_is_taken_apart() -> None:
    decoder = tiny_decoder(tiny_model(**ALL), spread=0.1).eval()
    with torch.no_grad():
        expected = decoder.losses(*BATCH.inputs, BATCH.labels, torch.tensor(1.0)).token_losses
        apply_recompute(decoder, "stream")
        streams: list[int] = []
        for layer in decoder.layers.values():
            layer.register_forward_hook(lambda layer, inputs, outputs: streams.append(outputs[0].shape[1]))
        found = decoder.losses(*BATCH.inputs, BATCH.labels, torch.tensor(1.0)).token_losses
    assert torch.equal(found, expected)
    assert streams == [2, 2]


def peak(mode: str, streams: int) -> int:
    """Most bytes alive in a forward and backward pass beside the parameters, without values."""
    with torch.device("meta"):
        decoder = Decoder(tiny_model(layers=4, streams={"count": streams, "prefix_tokens": 4}))
        inputs = [torch.empty(4, 256, dtype=torch.int64) for _ in range(4)]
        scale = torch.empty(())
    apply_recompute(decoder, mode)
    with MetaMemory([*decoder.parameters(), *inputs]) as memory:
        losses = decoder.losses(*inputs, scale)
        assert losses.lm is not None
        losses.lm.backward()
    return memory.peak


def test_one_streams_activations_exist_at_a_time() -> None:
    one, *several = (peak("none", streams) for streams in (1, 4, 8))
    apart = [peak("stream", streams) for streams in (4, 8)]
    assert several[0] > 3 * one
    # of each further stream the last state is kept, and what norm and aggregator need of it
    assert apart[0] < 0.5 * several[0]
    assert apart[1] < 0.4 * several[1]
    assert apart[1] - apart[0] < 0.2 * (several[1] - several[0])
