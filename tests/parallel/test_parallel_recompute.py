"""Recomputation: the same bits, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megascale.model.decoder import Decoder
from megascale.parallel.recompute import apply_recompute
from tiny import gradients, packed_batch, tiny_decoder, tiny_model

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
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
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
