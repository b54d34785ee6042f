"""ParScale's invariants (arXiv 2505.10475): streams can be permuted, agree when their prefixes do, cost nothing when unseen, and are
one until the first layer's prefixes part them.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.model.attention import pack
from megascale.model.decoder import Decoder
from megascale.model.exchange import identity
from megascale.model.initialize import PREFIX_STD, initialize
from megascale.model.origin import Draw, origin_of
from megascale.model.residual import expand
from megascale.model.streams import Aggregator
from tiny import Batch, gradients, largest_error, packed_batch, tiny_decoder, tiny_model

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


@settings(max_examples=8)
@given(slots=st.integers(1, 60), streams=st.integers(2, 5))
def test_prefixes_that_no_query_sees_leave_the_plain_model(slots: int, streams: int) -> None:
    """The last rotary pair hardly turns with this theta: a bias there and a prefix against it score -35000 everywhere."""
    shape = {"qkv_bias": True, "rotary": {"theta": 1e12}}
    plain = tiny_decoder(tiny_model(**shape), spread=0.2)
    decoder = tiny_decoder(tiny_model(streams={"count": streams, "prefix_tokens": slots}, **shape), spread=0.2)
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


# The first layer, once for all streams -----------------------------------------------------------------------------------

ROUTED = {"experts": {"count": 4, "per_token": 2, "router": "rl_r"}, "altup": {"blocks": 2}}


@pytest.mark.parametrize(
    "settings", [{}, {"altup": {"blocks": 3, "read": "predicted"}}, ROUTED], ids=["plain", "altup", "routed"]
)
def test_the_first_layer_computes_once_what_streams_share(settings: dict) -> None:
    decoder = spread_decoder(layers=3, **settings).double()
    seen: dict[str, int] = {}
    for name, layer in decoder.layers.items():
        layer.attention.q.register_forward_hook(lambda _, x, y, name=name: seen.update({name: x[0].shape[1]}))
    BATCH.losses(decoder)
    assert list(seen.values()) == [1, STREAMS, STREAMS]


@pytest.mark.parametrize(
    "settings", [{}, {"altup": {"blocks": 3, "read": "predicted"}}, ROUTED], ids=["plain", "altup", "routed"]
)
def test_it_is_what_every_stream_would_have_computed(settings: dict) -> None:
    results = []
    for streams in (1, STREAMS):
        decoder = spread_decoder(layers=3, **settings).double()
        tokens, positions, documents = BATCH.inputs
        packing, origin = pack(positions, documents, decoder.config), origin_of(tokens, Draw(seed=5), identity)
        state = expand(decoder.embedding(tokens.flatten()), streams, decoder.config)
        state, reports = decoder.run(state, packing, origin)
        x, _ = decoder.join(state)
        (x.square().mean() + reports.get("balance", x.new_zeros(()))).backward()
        results.append((state.detach(), gradients(decoder), reports))
    (found, found_gradients, found_reports), (expected, expected_gradients, expected_reports) = results
    assert largest_error(found, expected) < 1e-12
    assert max(largest_error(found_gradients[name], true) for name, true in expected_gradients.items()) < 1e-9
    assert all(largest_error(found_reports[name], true) < 1e-5 for name, true in expected_reports.items())


# Correlation --------------------------------------------------------------------------------------------------------------


def of(x: torch.Tensor) -> Aggregator:
    """An aggregator of these streams [T, P, d]."""
    return Aggregator(x.shape[2], x.shape[1], 0.1)


@settings(max_examples=20)
@given(tokens=st.integers(1, 5), streams=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_similarity_is_the_mean_cosine_over_pairs(tokens: int, streams: int, seed: int) -> None:
    x = torch.randn(tokens, streams, 7, generator=torch.Generator().manual_seed(seed))
    pairs = [torch.cosine_similarity(x[:, p], x[:, q], dim=-1) for p in range(streams) for q in range(p)]
    torch.testing.assert_close(of(x).similarity(x), torch.stack(pairs).mean(0), rtol=1e-4, atol=1e-5)
    assert not of(x).similarity(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_equal_streams_have_the_similarity_one(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1, 8).to(dtype).expand(-1, 3, -1)
    found = of(x).similarity(x * torch.tensor([1.0, 2.0, 0.5], dtype=dtype)[:, None])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones(4), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_it_is_measured_in_training_alone() -> None:
    decoder = spread_decoder()
    found = BATCH.losses(decoder).stream_similarity
    assert found is not None and found.shape == (24,) and (found < 0.999).all()
    assert BATCH.losses(decoder.eval()).stream_similarity is None
    assert BATCH.losses(tiny_decoder(tiny_model())).stream_similarity is None


# How prefixes start, and what makes them --------------------------------------------------------------------------------


def started(**streams: object) -> Decoder:
    model = tiny_model(streams={"count": STREAMS, "prefix_tokens": 5, **streams})
    decoder = Decoder(model)
    initialize(decoder, model, 1)
    return decoder


STARTS = {
    "normal": {},
    "quiet": {"prefix_start": "quiet"},
    "network": {"reparameterise": 16},
    "quiet network": {"reparameterise": 16, "prefix_start": "quiet"},
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_every_new_tensor_learns_within_two_steps(start: dict) -> None:
    decoder = started(**start)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=1e-3)
    learned: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        BATCH.losses(decoder).lm.backward()
        learned |= {name for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert learned == {name for name, _ in decoder.named_parameters()}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_quiet_start_adds_nothing_and_takes_the_plain_mean(start: dict) -> None:
    decoder = started(**start)
    quiet = start.get("prefix_start") == "quiet"
    for layer in decoder.layers.values():
        keys, values = layer.attention.prefixes()
        assert keys.shape == values.shape == (STREAMS, 2, 5, 8)
        assert keys.std().item() == pytest.approx(PREFIX_STD, rel=0.3)
        assert (keys[0] != keys[1]).all()  # what parts the streams
        assert bool(values.any()) != quiet
    _, weights, _ = decoder.hidden(*BATCH.inputs)
    assert torch.equal(weights, torch.full_like(weights, 1 / STREAMS)) == quiet


def test_what_is_not_new_starts_alike() -> None:
    plain, *others = (dict(started(**start).named_parameters()) for start in ({"count": 1}, *STARTS.values()))
    assert all(torch.equal(other[name], weight) for other in others for name, weight in plain.items())


def test_the_network_of_one_stream_is_its_part_of_all() -> None:
    attention = started(reparameterise=16).layers["0"].attention
    whole = attention.prefixes()
    for number in range(STREAMS):
        one = attention.prefixes(torch.tensor([number]))
        assert all(torch.allclose(part, x[number : number + 1], rtol=1e-6, atol=1e-8) for part, x in zip(one, whole, strict=True))
