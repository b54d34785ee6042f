"""Every router inside the whole decoder, with streams and residual blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.model.attention import KeyValueCache
from megascale.model.decoder import Decoder, Losses
from megascale.model.origin import Draw
from megascale.model.routers import ROUTERS
from megascale.parallel.recompute import apply_recompute
from tiny import gradients, packed_batch, tiny_decoder, tiny_model

every_router = pytest.mark.parametrize("router", ROUTERS)
AXES: dict[str, Any] = {"streams": {"count": 2, "prefix_tokens": 4}, "altup": {"blocks": 2}}


def decoder_with(router: str, **experts: Any) -> Decoder:
    return tiny_decoder(tiny_model(experts={"count": 4, "per_token": 2, "router": router, **experts}, **AXES), spread=0.15)


def total(losses: Losses) -> Tensor:
    return sum((*losses.auxiliary.values(), *losses.rewarded.values()), losses.lm)


@pytest.mark.parametrize("per_token", [1, 2])
@every_router
def test_every_parameter_learns(router: str, per_token: int) -> None:
    decoder = decoder_with(router, per_token=per_token, shared=1)
    total(packed_batch([[40, 24], [64]]).losses(decoder)).backward()
    silent = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@every_router
@torch.no_grad()
def test_cached_decoding_is_the_full_forward_pass(router: str) -> None:
    decoder = decoder_with(router, capacity_factor=0.5).eval()
    batch = packed_batch([[11], [11]])
    expected = decoder(*batch.inputs)
    cache = KeyValueCache(decoder.config, 2, 11, decoder.embedding.weight)
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 11))]:
        found = decoder.decode(batch.tokens[:, start:stop], cache)
        torch.testing.assert_close(found, expected[:, stop - 1], rtol=1e-4, atol=1e-5)


@every_router
@torch.no_grad()
def test_in_evaluation_a_document_has_the_logits_that_it_has_alone(router: str) -> None:
    decoder = decoder_with(router, capacity_factor=0.5).eval()
    batch, alone = packed_batch([[5, 7], [12]]), packed_batch([[7]])
    found = decoder(batch.tokens[:1, 5:], alone.positions, alone.documents)[0]
    torch.testing.assert_close(decoder(*batch.inputs)[0, 5:], found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.6])
@every_router
def test_recomputed_layers_choose_again_what_they_chose(router: str, capacity: float | None) -> None:
    results = []
    batch = packed_batch([[9, 7], [16]])
    for mode in ("none", "layer"):
        decoder = decoder_with(router, capacity_factor=capacity)
        apply_recompute(decoder, mode)
        scale = torch.tensor(0.05)
        total(decoder.losses(*batch.inputs, batch.labels, scale, Draw(seed=1, step=2, sample=3))).backward()
        results.append(gradients(decoder))
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[0].items())


@every_router
def test_bf16_keeps_the_router_in_fp32_and_the_loss_close(router: str) -> None:
    batch, losses = packed_batch([[20, 12], [32]]), []
    for narrow in (False, True):
        decoder = decoder_with(router)
        for name, parameter in decoder.named_parameters() if narrow else ():
            if not any(word in name for word in ("norm", "router", "residual")):
                parameter.data = parameter.data.bfloat16()
        found = batch.losses(decoder)
        total(found).backward()
        routers = [p for name, p in decoder.named_parameters() if "router" in name]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in routers)
        losses.append(float(found.lm.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_only_the_draws_depend_on_the_step() -> None:
    batch, scale = packed_batch([[9, 7], [16]]), torch.tensor(0.05)
    for router in ROUTERS:
        decoder = decoder_with(router)
        first, again, later = (decoder.losses(*batch.inputs, batch.labels, scale, Draw(1, step)).lm for step in (1, 1, 2))
        assert torch.equal(first, again)
        assert torch.equal(first, later) == (router != "rl_r")
