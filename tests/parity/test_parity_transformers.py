"""The plain decoder and its experts against transformers: same weights, same logits, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foreign import CASES
from megascale.model.attention import KeyValueCache
from megascale.model.decoder import Decoder
from tiny import largest_error, packed_batch, tiny_decoder


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
    """Our parameter, or its gradient, out of theirs. In memory they join gate and up of all experts in one [E, 2o, d] tensor."""
    layer, _, part = name.rpartition(".feed_forward.")
    if part in ("gate", "up"):
        return values[f"model.{layer}.mlp.experts.gate_up_proj"].chunk(2, 1)[part == "up"]
    if part == "down":
        return values[f"model.{layer}.mlp.experts.down_proj"]
    return values[theirs(name)]


def pair(case: str) -> tuple[Decoder, nn.Module]:
    """Our decoder and theirs, with the same random weights; no parameter of either is left out."""
    other = CASES[case].build()
    decoder, values = tiny_decoder(CASES[case].model), dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(pick(values, name))
    assert sum(p.numel() for p in decoder.parameters()) == sum(p.numel() for p in other.parameters())
    return decoder, other


def random_tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and positions [rows, length]."""
    tokens = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(length).expand(rows, -1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(case: str) -> None:
    decoder, other = pair(case)
    tokens, positions = random_tokens(2, 19)
    logits = decoder(tokens, positions, torch.zeros_like(positions))
    expected = other(input_ids=tokens).logits
    close(logits, expected)

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


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_is_that_of_transformers(case: str) -> None:
    decoder, other = pair(case)
    decoder.eval()
    tokens, _ = random_tokens(2, 15)
    cache, theirs_cache = KeyValueCache(decoder.config, 2, 15, tokens.new_zeros((), dtype=torch.float32)), None
    with torch.no_grad():
        for start, stop in ((0, 8), *((i, i + 1) for i in range(8, 15))):
            answer = other(input_ids=tokens[:, start:stop], past_key_values=theirs_cache, use_cache=True)
            theirs_cache = answer.past_key_values
            close(decoder.decode(tokens[:, start:stop], cache), answer.logits[:, -1])


@pytest.mark.parametrize("case", CASES)
def test_left_padding_of_transformers_changes_nothing(case: str) -> None:
    """They pad texts to one length and mask the padding; ours are computed alone, and packed without any."""
    decoder, other = pair(case)
    tokens, positions = random_tokens(1, 14)
    padding = 5
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), tokens], 1)
    mask = (torch.arange(14 + padding) >= padding).long()[None]
    theirs_positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = other(input_ids=padded, attention_mask=mask, position_ids=theirs_positions).logits[:, padding:]
    close(decoder(tokens, positions, torch.zeros_like(positions)), expected)


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_those_of_transformers(case: str) -> None:
    """Positions that restart mark documents there as well, in a batch of one text."""
    decoder, other = pair(case)
    batch = packed_batch([[7, 3, 9]])
    theirs_packed = other(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False)  # a cache would hide the borders
    close(decoder(*batch.inputs), theirs_packed.logits)
    alone = other(input_ids=batch.tokens[:, 10:]).logits
    close(decoder(*batch.inputs)[:, 10:], alone)


def test_mixtral_balances_over_the_same_choices() -> None:
    """Their balance loss counts k choices a token; ours is divided by k, and summed over layers instead of pooled."""
    decoder, other = pair("Mixtral")
    tokens, positions = random_tokens(2, 19)
    _, _, reports = decoder.hidden(tokens, positions, torch.zeros_like(positions))
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = other(input_ids=tokens, output_router_logits=True).router_logits
    expected = sum(load_balancing_loss_func((layer,), 4, 2) / 2 for layer in logits)
    torch.testing.assert_close(reports["balance"], expected, rtol=1e-5, atol=1e-5)
