"""Weight gradients that wait are those of autograd, to the bit, and reach the weight once for each micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megascale.model.layers import SwiGLU
from megascale.parallel.deferred import defer_weight_gradients
from tiny import packed_batch, tiny_decoder, tiny_model


def layer(seed: int = 0) -> SwiGLU:
    torch.manual_seed(seed)
    return SwiGLU(16, 24)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_one_backward_pass(dtype: torch.dtype) -> None:
    plain, split = layer().to(dtype), layer().to(dtype)
    later = defer_weight_gradients(split)
    inputs = [torch.randn(10, 2, 16, dtype=dtype) for _ in range(3)]
    runs = []
    for x in inputs:
        plain(x.clone().requires_grad_()).square().sum().backward()
        x.requires_grad_()
        split(x).square().sum().backward()
        assert x.grad is not None
        runs.append(later.take())  # in the order of the micro-batches, later
    assert gradients(split) == {}
    for run in runs:
        run()
    expected, found = gradients(plain), gradients(split)
    assert expected.keys() == found.keys() == {"gate.weight", "up.weight", "down.weight"}
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_several_uses_of_a_weight_are_one_gradient_and_hooks_see_it_once() -> None:
    plain, split = layer(), layer()
    later, seen = defer_weight_gradients(split), []
    split.down.weight.register_hook(lambda gradient: seen.append("gradient"))
    split.down.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    x = torch.randn(10, 1, 16, requires_grad=True)
    for module in (plain, split):
        (module(x) + module(2 * x)).square().sum().backward()
    assert seen == []
    later.take()()
    assert seen == ["gradient", "accumulated"]
    assert all(torch.equal(gradients(split)[name], gradient) for name, gradient in gradients(plain).items())


def test_frozen_weights_and_inputs_without_a_gradient_do_not_wait() -> None:
    split = layer()
    later = defer_weight_gradients(split)
    split.up.weight.requires_grad_(False)
    split(torch.randn(10, 1, 16)).sum().backward()  # an input behind frozen parameters: gate's weight cannot wait
    assert set(gradients(split)) == {"gate.weight"}
    later.take()()
    assert set(gradients(split)) == {"gate.weight", "down.weight"}
    with torch.no_grad():
        split(torch.randn(10, 1, 16))
    assert later.waiting == {}


def test_attention_feed_forward_and_experts_wait_and_all_gradients_are_those_of_one_pass() -> None:
    settings = {
        "streams": {"count": 2, "prefix_tokens": 4},
        "experts": {"count": 4, "per_token": 2, "width": 16, "shared": 1},
        "altup": {"blocks": 2},
        "qkv_bias": True,
    }
    model, batch = tiny_model(**settings), packed_batch([[9, 7]])
    plain, split = tiny_decoder(model, spread=0.02), tiny_decoder(model, spread=0.02)
    later = defer_weight_gradients(split)
    for decoder in (plain, split):
        found = batch.losses(decoder)
        assert found.lm is not None
        (found.lm + sum(found.auxiliary.values())).backward()
    waiting = {name for name, p in split.named_parameters() if p in later.waiting}
    attention = [f"attention.{name}.weight" for name in "qkvo"]
    experts = [f"feed_forward.{name}" for name in ("gate", "up", "down")]
    shared = [f"feed_forward.shared.{name}.weight" for name in ("gate", "up", "down")]
    assert waiting == {f"layers.{i}.{name}" for i in range(2) for name in (*attention, *experts, *shared)}
    later.take()()
    expected, found_gradients = gradients(plain), gradients(split)
    assert expected.keys() == found_gradients.keys()
    assert [name for name, gradient in expected.items() if not torch.equal(found_gradients[name], gradient)] == []
