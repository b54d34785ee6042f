"""Sequence-AltUp (arXiv 2301.13310): middle layers compute on every k-th token of a document and correct the others by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megascale.model.attention import KeyValueCache, first_tokens, pack, places
from megascale.model.decoder import Decoder
from megascale.model.strided import SequenceResidual
from tiny import packed_batch, tiny_decoder, tiny_model

lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


def strided(stride: int = 3, **more: Any) -> dict[str, Any]:
    return {"layers": 4, "altup": {"form": "sequence", "stride": stride}, **more}


def even(texts: list[list[int]]) -> list[list[int]]:
    """Texts of the same number of tokens: shorter ones get one more document."""
    longest = max(map(sum, texts))
    return [text + [longest - sum(text)] if sum(text) < longest else text for text in texts]


@settings(max_examples=50)
@given(texts=lengths, stride=st.integers(2, 5))
def test_kept_are_the_multiples_of_the_stride_in_each_document(texts: list[list[int]], stride: int) -> None:
    batch = packed_batch(even(texts))
    kept = pack(batch.positions, batch.documents, tiny_model(**strided(stride))).kept
    assert kept is not None
    positions, count = batch.positions.flatten().tolist(), len(kept.tokens)
    assert kept.tokens.tolist() == [t for t, position in enumerate(positions) if position % stride == 0]
    for token, position in enumerate(positions):
        last = token - position % stride
        assert kept.tokens[kept.group[token]] == last
        assert kept.place[token, 0] == (kept.group[token] if token == last else count)
        assert token in kept.members[kept.group[token]]
    assert sorted(t for t in kept.members.flatten().tolist() if t < len(positions)) == list(range(len(positions)))
    documents = [-(-length // stride) for text in even(texts) for length in text]
    assert kept.packing.borders.diff().tolist() == documents
    assert kept.packing.longest >= max(documents)
    assert torch.equal(kept.packing.cos, pack(batch.positions, batch.documents, tiny_model()).cos[kept.tokens])


@given(texts=lengths)
def test_places_counted_on_the_host_are_the_positions(texts: list[list[int]]) -> None:
    batch = packed_batch(even(texts))
    assert torch.equal(places(first_tokens(batch.documents)), batch.positions.flatten())


def by_definition(residual: SequenceResidual, x: Tensor, update: Tensor, positions: Tensor, stride: int) -> Tensor:
    """Token by token; update [T', P, d] of the kept ones in order."""
    (more, a2), b = residual.predict, 1 + residual.correct
    rows, number = [], -1
    for t, position in enumerate(positions.tolist()):
        number += position % stride == 0
        tau = t - position % stride
        predicted, at_tau = (1 + more) * x[t] + a2 * x[tau], (1 + more) * x[tau] + a2 * x[tau]
        rows.append(predicted + b * (x[tau] + update[number] - at_tau))
    return torch.stack(rows)


@settings(max_examples=30)
@given(texts=lengths, stride=st.integers(2, 5), spread=st.floats(0, 2))
def test_a_layer_is_the_definition_with_its_gradients(texts: list[list[int]], stride: int, spread: float) -> None:
    batch, generator = packed_batch(even(texts)), torch.Generator().manual_seed(1)
    residual = SequenceResidual().double()
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    packing = pack(batch.positions, batch.documents, tiny_model(**strided(stride)))
    assert packing.kept is not None
    shapes = (batch.tokens.numel(), 2, 1, 8), (len(packing.kept.tokens), 2, 8)
    state, update = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    parts = residual.split(state)
    assert torch.equal(residual.read(parts, packing), state[packing.kept.tokens, :, 0])
    found = residual(parts, update, packing)[:, :, 0]
    expected = by_definition(residual, state[:, :, 0], update, batch.positions.flatten(), stride)
    torch.testing.assert_close(found, expected)
    inputs, factors = (state, update, *residual.parameters()), torch.linspace(-1, 1, found.numel()).view(found.shape)
    for got, true in zip(
        torch.autograd.grad((found * factors).sum(), inputs), torch.autograd.grad((expected * factors).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, true)


def test_it_starts_by_giving_each_token_the_update_of_its_kept_one() -> None:
    batch = packed_batch([[5, 4]])
    packing = pack(batch.positions, batch.documents, tiny_model(**strided(3)))
    x, update = torch.randn(9, 2, 8), torch.randn(4, 2, 8)
    residual = SequenceResidual()
    found = residual(residual.split(x[:, :, None]), update, packing)
    assert torch.equal(found[:, :, 0], x + update[[0, 0, 0, 1, 1, 2, 2, 2, 3]])


@pytest.mark.parametrize("more", [{}, {"streams": {"count": 2, "prefix_tokens": 3}}, {"sliding_window": 5}], ids=str)
@torch.no_grad()
def test_documents_no_longer_than_one_kept_token_apart_are_those_of_the_plain_model(more: dict[str, Any]) -> None:
    """Where every token is kept, the layers are the plain ones: documents of one token each."""
    batch = packed_batch([[1] * 6])
    plain, model = tiny_decoder(tiny_model(layers=4, **more)), tiny_decoder(tiny_model(**strided(3, **more)))
    torch.testing.assert_close(model(*batch.inputs), plain(*batch.inputs))


class Rows(nn.Module):
    """Notes how many tokens a module sees."""

    def __init__(self, module: nn.Module, seen: list[int]):
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.seen.append(x.shape[0])
        return self.module(x, *rest)


@torch.no_grad()
def test_the_first_and_the_last_layer_see_all_tokens_and_the_others_the_kept_ones() -> None:
    decoder, seen = tiny_decoder(tiny_model(**strided(4))), list[int]()
    for layer in decoder.layers.values():
        layer.attention, layer.feed_forward = Rows(layer.attention, seen), Rows(layer.feed_forward, seen)
    decoder(*packed_batch([[9, 7], [16]]).inputs)
    assert seen == [32, 32, 9, 9, 9, 9, 32, 32]


@torch.no_grad()
def test_the_window_reaches_as_far_back_as_in_the_other_layers() -> None:
    """A window of 5 tokens and a stride of 2: a kept token sees itself and two kept ones before it."""
    decoder = tiny_decoder(tiny_model(**strided(2, sliding_window=5)), spread=0.1)
    assert decoder.layers["1"].attention.window == 3
    cut = pack(*packed_batch([[13]]).inputs[1:], decoder.config)
    assert cut.kept is not None
    x = torch.randn(7, 1, 32)
    attend = decoder.layers["1"].attention
    before = attend(x, cut.kept.packing)
    x[0] += 1
    changed = (attend(x, cut.kept.packing) - before).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [True] * 3 + [False] * 4


@torch.no_grad()
def test_the_cache_grows_by_kept_tokens_alone() -> None:
    decoder = tiny_decoder(tiny_model(**strided(3)), spread=0.1)
    cache = KeyValueCache(decoder.config, 2, 11, decoder.embedding.weight)
    assert [pair[0].shape[1] for pair in cache.pairs.values()] == [11, 4, 4, 11]
    tokens = packed_batch([[11], [11]]).tokens
    for start, stop in [(0, 5), *((i, i + 1) for i in range(5, 11))]:
        decoder.decode(tokens[:, start:stop], cache)
        stored = [int(keys.abs().amax((0, 2, 3)).gt(0).sum()) for keys, _ in cache.pairs.values()]
        assert stored == [stop, -(-stop // 3), -(-stop // 3), stop]


def test_routers_of_strided_layers_count_kept_tokens() -> None:
    decoder: Decoder = tiny_decoder(tiny_model(**strided(4, experts={"count": 4, "per_token": 2})))
    losses = packed_batch([[9, 7], [16]]).losses(decoder)
    assert [int(losses.statistics[f"moe/layer_{i:02d}/load"].sum()) for i in range(4)] == [64, 18, 18, 64]
    assert losses.auxiliary["balance"] > 3.9  # four layers of about one
