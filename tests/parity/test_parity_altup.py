"""AltUp against transformers' Gemma 3n, whose coefficients depend on the token; with a constant router also the paper's learned numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp

from megascale.model.altup import AltUpResidual
from tiny import tiny_model

WIDTH = 64
CASES = [(2, 0), (2, 1), (4, 0), (4, 3)]
"""blocks, computed block"""


def gemma(blocks: int, computed: int) -> Any:
    """Their module with every parameter N(0, 1), the router's 20 times that: else its tanh sees almost nothing."""
    config = Gemma3nTextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=128,
        vocab_size=100,
        vocab_size_per_layer_input=100,
        altup_num_inputs=blocks,
        altup_active_idx=computed,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
    )
    module = Gemma3nTextAltUp(config)
    torch.manual_seed(blocks + computed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        module.modality_router.weight.mul_(20)
    return module.eval()


def ours(blocks: int, computed: int, **settings: str) -> AltUpResidual:
    return AltUpResidual(tiny_model(width=WIDTH, altup={"blocks": blocks, "read": "predicted", **settings}), computed)


def copied(theirs: Any, blocks: int, computed: int) -> AltUpResidual:
    """Our module with their parameters."""
    module = ours(blocks, computed, coefficients="token")
    with torch.no_grad():
        for name, parameter in pairs(module, theirs).values():
            name.copy_(parameter)
    return module


def pairs(module: AltUpResidual, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "predict": (module.predict, theirs.prediction_coefs.weight),
        "correct": (module.correct, theirs.correction_coefs.weight),
        "modality": (module.modality, theirs.modality_router.weight),
        "modality_norm": (module.modality_norm, theirs.router_norm.weight),
    }


def inputs(blocks: int) -> tuple[Tensor, Tensor]:
    """Their state [K, B, T, d] and what a layer made of the computed block [B, T, d]."""
    generator = torch.Generator().manual_seed(blocks)
    state, activated = (torch.randn(*n, 2, 5, WIDTH, generator=generator) for n in ((blocks,), ()))
    return state.requires_grad_(), activated.requires_grad_()


def step(module: AltUpResidual, state: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted block and the corrected state [K, B, T, d], of their state; B stands where we have streams."""
    parts = module.split(state.permute(2, 1, 0, 3))
    read = module.read(parts)
    corrected = module(parts, activated.transpose(0, 1) - read)
    return read.transpose(0, 1), corrected.permute(2, 1, 0, 3)


def close(found: Tensor, expected: Tensor) -> None:
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * max(scale, 1.0))


@pytest.mark.parametrize(("blocks", "computed"), CASES)
def test_coefficients_of_the_token_are_gemmas_with_all_gradients(blocks: int, computed: int) -> None:
    theirs = gemma(blocks, computed)
    module = copied(theirs, blocks, computed)
    state, activated = inputs(blocks)
    predicted = theirs.predict(state)
    expected = predicted[computed], theirs.correct(predicted, activated)
    found = step(module, state, activated)
    factors = [torch.randn(x.shape, generator=torch.Generator().manual_seed(7)) for x in expected]
    named = pairs(module, theirs)
    gradients = []
    for outs, parameters in ((found, [a for a, _ in named.values()]), (expected, [b for _, b in named.values()])):
        loss = sum((out * factor).sum() for out, factor in zip(outs, factors, strict=True))
        gradients.append(torch.autograd.grad(loss, (state, activated, *parameters), retain_graph=True))
    for got, true in (*zip(found, expected, strict=True), *zip(*gradients, strict=True)):
        close(got, true)


def test_the_comparison_tells_a_transposed_mix_from_the_right_one() -> None:
    theirs = gemma(4, 1)
    module = copied(theirs, 4, 1)
    state, activated = inputs(4)
    with torch.no_grad():
        module.predict.copy_(module.predict.view(4, 4, 4).transpose(0, 1).reshape(16, 4))
        expected = theirs.correct(theirs.predict(state), activated)
        assert (step(module, state, activated)[1] - expected).abs().max() > 1


@pytest.mark.parametrize(("blocks", "computed"), CASES)
@pytest.mark.parametrize("read", ["old", "predicted"])
@torch.no_grad()
def test_learned_numbers_are_gemmas_with_a_constant_router(blocks: int, computed: int, read: str) -> None:
    theirs = gemma(blocks, computed)
    one = torch.zeros(blocks).index_fill_(0, torch.tensor(0), 1.0)
    theirs.compute_router_modalities = lambda x: one.expand(*x.shape[:-1], -1)
    module = ours(blocks, computed, read=read)
    module.predict.copy_(theirs.prediction_coefs.weight[:, 0].view(blocks, blocks))
    module.correct.copy_(theirs.correction_coefs.weight[:, 0])
    state, activated = inputs(blocks)
    predicted = theirs.predict(state)
    block, corrected = step(module, state, activated)
    close(block, predicted[computed] if read == "predicted" else state[computed])
    close(corrected, theirs.correct(predicted, activated))
