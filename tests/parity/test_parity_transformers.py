"""The plain decoder and its experts against transformers: same weights, same logits, same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.decoder import Decoder
from tiny import largest_error, tiny_decoder, tiny_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
EXPERTS = {"count": 4, "per_token": 2, "width": 64}


def matching(kind: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, f"{kind}Config")(**{**SHAPE, **config}, attn_implementation="eager")
        return getattr(transformers, f"{kind}ForCausalLM")(settings)

    return build


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[Callable[[], nn.Module], Model]] = {
    "Llama": (matching("Llama"), tiny_model()),
    "Llama 3.1": (
        matching("Llama", rope_parameters=LLAMA3),
        tiny_model(rotary={"scaling": "llama3", "factor": 4.0, "original_context": 16}),
    ),
    "tied Llama": (matching("Llama", tie_word_embeddings=True), tiny_model(tie_embeddings=True)),
    "Qwen2": (matching("Qwen2"), tiny_model(qkv_bias=True)),
    "Qwen3": (matching("Qwen3"), tiny_model(qk_norm=True)),
    "Mistral": (matching("Mistral", sliding_window=5), tiny_model(sliding_window=5)),
    "Mixtral": (matching("Mixtral", num_local_experts=4, num_experts_per_tok=2), tiny_model(experts=EXPERTS)),
}


def theirs(name: str) -> str:
    """The name in transformers of one of our parameters that exists there as it is."""
    renamed = name.replace("attention_norm", "input_layernorm").replace("feed_forward_norm", "post_attention_layernorm")
    for letter in "qkvo":
        renamed = renamed.replace(f"attention.{letter}.", f"self_attn.{letter}_proj.")
        renamed = renamed.replace(f"attention.{letter}_norm.", f"self_attn.{letter}_norm.")
    for part in ("gate", "up", "down"):
        renamed = renamed.replace(f"feed_forward.{part}.weight", f"mlp.{part}_proj.weight")
    renamed = renamed.replace("feed_forward.router", "mlp.gate")
    if renamed.startswith("head."):
        return f"lm_{renamed}"
    return "model." + renamed.replace("embedding.", "embed_tokens.")


def pick(values: dict[str, Tensor], name: str) -> Tensor:
    """Our parameter, or its gradient, out of theirs. Mixtral joins gate and up in one [E, 2o, d] tensor."""
    layer, _, part = name.rpartition(".feed_forward.")
    if part in ("gate", "up"):
        return values[f"model.{layer}.mlp.experts.gate_up_proj"].chunk(2, 1)[part == "up"]
    if part == "down":
        return values[f"model.{layer}.mlp.experts.down_proj"]
    return values[theirs(name)]


def pair(case: str) -> tuple[Decoder, nn.Module]:
    """Our decoder and theirs, with the same random weights; no parameter of either is left out."""
    build, config = CASES[case]
    torch.manual_seed(0)
    other = build().eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    decoder, values = tiny_decoder(config), dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(pick(values, name))
    assert sum(p.numel() for p in decoder.parameters()) == sum(p.numel() for p in other.parameters())
    return decoder, other


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(case: str) -> None:
    decoder, other = pair(case)
    tokens = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(19).expand(2, -1)
    logits = decoder(tokens, positions, torch.zeros_like(positions))
    expected = other(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    losses = decoder.losses(tokens, positions, torch.zeros_like(positions), labels, torch.tensor(1 / 36))
    their_loss = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(losses.lm, their_loss, rtol=1e-6, atol=1e-6)
    losses.lm.backward()
    their_loss.backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert largest_error(parameter.grad, pick(grads, name)) < 1e-4, name


def test_mixtral_balances_over_the_same_choices() -> None:
    """Their balance loss counts k choices a token; ours is divided by k, and summed over layers instead of pooled."""
    decoder, other = pair("Mixtral")
    tokens = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(19).expand(2, -1)
    _, _, reports = decoder.hidden(tokens, positions, torch.zeros_like(positions))
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = other(input_ids=tokens, output_router_logits=True).router_logits
    expected = sum(load_balancing_loss_func((layer,), 4, 2) / 2 for layer in logits)
    torch.testing.assert_close(reports["balance"], expected, rtol=1e-5, atol=1e-5)
