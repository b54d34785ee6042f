"""A layer is one graph for torch.compile, of every kind, with and without kernels: nothing in it makes the compiler give up halfway."""

from __future__ import annotations

import pytest
import torch

from layouts import full_unless
from megascale.config.schema import Model
from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from tiny import tiny_model

EXPERTS = {"count": 4, "per_token": 2, "width": 16}
MODELS = {
    "plain": {},
    "P": {"streams": {"count": 2, "prefix_tokens": 3}},
    "K": {"altup": {"blocks": 2}},
    "K, predicted, by token": {"altup": {"blocks": 2, "read": "predicted", "coefficients": "token"}},
    "every second token": {"altup": {"form": "sequence", "stride": 2}},
    **{f"E, {router}": {"experts": {**EXPERTS, "router": router}} for router in ("softmax", "sigmoid", "s_base")},
    "E, hash": {"experts": {"count": 4, "width": 16, "router": "hash"}},
    "E, capacity": {"experts": {**EXPERTS, "capacity_factor": 1.0}},
    "P E K": {"streams": {"count": 2, "prefix_tokens": 3}, "experts": {**EXPERTS, "shared": 1}, "altup": {"blocks": 2}},
}


def loss_and_gradient(model: Model, fused: bool, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    decoder = Decoder(model)
    initialize(decoder, model, 1)
    for module in decoder.modules():
        if hasattr(module, "fused"):
            module.fused = fused
    if compiled:
        for layer in decoder.layers.values():
            layer.compile(backend="aot_eager", fullgraph=True)
    tokens = torch.arange(32).view(2, 16) % 11
    documents = torch.zeros(2, 16, dtype=torch.int32)
    losses = decoder.losses(tokens, torch.arange(16).expand(2, -1), documents, tokens, torch.tensor(1 / 32))
    assert losses.lm is not None
    sum(losses.auxiliary.values(), losses.lm).backward()
    weight = next(p for name, p in decoder.named_parameters() if name.endswith("attention.q.weight"))
    assert weight.grad is not None
    return losses.lm.detach(), weight.grad


CASES = [f"{name}, {form}" for name in MODELS for form in ("plain", "kernels")]
QUICK = ("P E K, plain", "P E K, kernels", "K, predicted, by token, kernels", "every second token, plain", "E, capacity, kernels")


@pytest.mark.parametrize("case", full_unless(QUICK, CASES))
def test_a_layer_is_one_graph(case: str) -> None:
    torch._dynamo.reset()
    name, _, form = case.rpartition(", ")
    model = tiny_model(**MODELS[name])
    eager, compiled = (loss_and_gradient(model, form == "kernels", compile) for compile in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)
