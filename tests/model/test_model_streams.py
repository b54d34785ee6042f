"""ParScale's invariants (arXiv 2505.10475): streams can be permuted, agree when their prefixes do, and cost nothing when unseen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.model.decoder import Decoder
from megascale.model.streams import Aggregator
from tiny import Batch, packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[7, 5], [12]])
STREAMS = 3


def spread_decoder(**settings) -> Decoder:
    return tiny_decoder(tiny_model(streams={"count": STREAMS, "prefix_tokens": 5}, **settings), spread=0.2)


@torch.no_grad()
def logits(decoder: Decoder, batch: Batch = BATCH) -> torch.Tensor:
    return decoder(*batch.inputs)


@torch.no_grad()
def share_prefixes(decoder: Decoder) -> None:
    for layer in decoder.layers.values():
        for prefix in (layer.attention.prefix_k, layer.attention.prefix_v):
            prefix.copy_(prefix[:1].expand_as(prefix))


@settings(max_examples=6)
@given(order=st.permutations(range(STREAMS)))
def test_permuting_streams_leaves_the_logits(order: list[int]) -> None:
    decoder = spread_decoder(experts={"count": 4, "per_token": 2}, altup={"blocks": 2})
    before = logits(decoder)
    aggregator, width = decoder.aggregator, decoder.config.width
    with torch.no_grad():
        for layer in decoder.layers.values():
            for prefix in (layer.attention.prefix_k, layer.attention.prefix_v):
                prefix.copy_(prefix[order])
        aggregator.hidden.weight.copy_(aggregator.hidden.weight.view(width, STREAMS, width)[:, order].flatten(1))
        aggregator.mix.weight.copy_(aggregator.mix.weight[order])
        aggregator.mix.bias.copy_(aggregator.mix.bias[order])
    torch.testing.assert_close(logits(decoder), before, rtol=1e-4, atol=1e-5)


def test_streams_differ_by_their_prefixes_alone() -> None:
    decoder = spread_decoder()
    states: list[torch.Tensor] = []
    decoder.hidden(*BATCH.inputs, watch=lambda _, state: states.append(state.detach()))
    assert (states[-1][:, 0] - states[-1][:, 1]).abs().max() > 0.01
    share_prefixes(decoder)
    states.clear()
    decoder.hidden(*BATCH.inputs, watch=lambda _, state: states.append(state.detach()))
    torch.testing.assert_close(states[-1][:, 0], states[-1][:, 1], rtol=1e-5, atol=1e-6)


def test_with_equal_prefixes_the_aggregator_does_not_matter() -> None:
    decoder = spread_decoder()
    share_prefixes(decoder)
    before = logits(decoder)
    BATCH.losses(decoder).lm.backward()
    for linear in (decoder.aggregator.hidden, decoder.aggregator.mix):
        assert linear.weight.grad.abs().max() < 1e-6
    with torch.no_grad():
        decoder.aggregator.mix.weight.normal_()
    torch.testing.assert_close(logits(decoder), before, rtol=1e-4, atol=1e-5)


def test_prefixes_that_no_query_sees_leave_the_plain_model() -> None:
    """The last rotary pair hardly turns with this theta: a bias there and a prefix against it score -35000 everywhere."""
    shape = {"qkv_bias": True, "rotary": {"theta": 1e12}}
    plain = tiny_decoder(tiny_model(**shape), spread=0.2)
    decoder = spread_decoder(**shape)
    channel = decoder.config.head_dim // 2 - 1
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            decoder.get_parameter(name).copy_(parameter)
        for model in (plain, decoder):
            for layer in model.layers.values():
                layer.attention.q.weight.view(-1, 8, 32)[:, channel].zero_()
                layer.attention.q.bias.view(-1, 8)[:, channel] = 10.0
        assert (logits(decoder) - logits(plain)).abs().max() > 1e-3
        for layer in decoder.layers.values():
            layer.attention.prefix_k.zero_()
            layer.attention.prefix_k[..., channel] = -1e4
    torch.testing.assert_close(logits(decoder), logits(plain), rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(tokens=st.integers(1, 6), streams=st.integers(2, 8), smoothing=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_weights_sum_to_one_and_none_is_below_its_share_of_epsilon(
    tokens: int, streams: int, smoothing: float, seed: int
) -> None:
    torch.manual_seed(seed)
    aggregator = Aggregator(8, streams, smoothing)
    torch.nn.init.normal_(aggregator.mix.weight, std=20)
    x = torch.randn(tokens, streams, 8)
    y, weights = aggregator(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens))
    assert weights.min() >= smoothing / streams - 1e-6
    torch.testing.assert_close(y, (weights[..., None] * x).sum(1))


def test_a_zero_last_layer_is_the_plain_mean() -> None:
    aggregator, x = Aggregator(8, 4, 0.1), torch.randn(5, 4, 8)
    torch.nn.init.zeros_(aggregator.mix.weight)
    torch.nn.init.zeros_(aggregator.mix.bias)
    torch.testing.assert_close(aggregator(x)[0], x.mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_are_at_least_fp32(dtype: torch.dtype) -> None:
    y, weights = Aggregator(8, 2, 0.1).to(dtype)(torch.randn(3, 2, 8, dtype=dtype))
    assert y.dtype == dtype
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
