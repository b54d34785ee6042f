"""The whole decoder: documents by themselves, cached decoding, and the plain model where P = E = K = 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascale.model.attention import KeyValueCache
from megascale.model.decoder import Decoder
from megascale.model.loss import IGNORED
from tiny import Batch, packed_batch, tiny_decoder, tiny_model

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen": {"qkv_bias": True, "qk_norm": True, "tie_embeddings": True},
    "window": {"sliding_window": 4},
    "streams": {"streams": {"count": 3, "prefix_tokens": 5}},
    "experts": {"experts": {"count": 4, "per_token": 2, "shared": 1}},
    "some layers routed": {"layers": 3, "experts": {"count": 4, "every": 2, "offset": 1}},
    "altup": {"altup": {"blocks": 2}},
    "gemma": {"altup": {"blocks": 3, "read": "predicted", "select": "same"}},
    "by token": {"altup": {"blocks": 2, "coefficients": "token"}},
    "wide": {
        "streams": {"count": 2, "prefix_tokens": 5},
        "altup": {"blocks": 2, "form": "wide", "coefficients": "token", "read": "predicted"},
        "tie_embeddings": True,
    },
    "sequence": {
        "layers": 4,
        "streams": {"count": 2, "prefix_tokens": 5},
        "experts": {"count": 4, "per_token": 2, "every": 2},
        "altup": {"form": "sequence", "stride": 3},
    },
    "sequence with a window": {"layers": 3, "altup": {"form": "sequence", "stride": 2}, "sliding_window": 4},
    "all": {
        "streams": {"count": 2, "prefix_tokens": 5},
        "experts": {"count": 4, "per_token": 2},
        "altup": {"blocks": 2},
        "sliding_window": 4,
        "rotary": {"scaling": "yarn", "factor": 4.0, "original_context": 64},
    },
}
every_feature = pytest.mark.parametrize("settings", FEATURES.values(), ids=FEATURES)


def decoder_with(settings: dict[str, Any]) -> Decoder:
    return tiny_decoder(tiny_model(**settings), spread=0.15)


@every_feature
@torch.no_grad()
def test_a_document_has_the_logits_that_it_has_alone(settings: dict[str, Any]) -> None:
    decoder = decoder_with(settings)
    lengths = [[5, 7, 1, 3], [9, 7], [16]]
    batch = packed_batch(lengths)
    together = decoder(*batch.inputs)
    for text, documents in enumerate(lengths):
        start = 0
        for length in documents:
            alone = packed_batch([[length]])
            tokens = batch.tokens[text : text + 1, start : start + length]
            found = decoder(tokens, alone.positions, alone.documents)[0]
            torch.testing.assert_close(together[text, start : start + length], found, rtol=1e-4, atol=1e-5)
            start += length


@every_feature
@torch.no_grad()
def test_cached_decoding_is_the_full_forward_pass(settings: dict[str, Any]) -> None:
    decoder = decoder_with(settings)
    batch = packed_batch([[11], [11]])
    expected = decoder(*batch.inputs)
    cache = KeyValueCache(decoder.config, 2, 11, decoder.embedding.weight)
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 11))]:
        found = decoder.decode(batch.tokens[:, start:stop], cache)
        torch.testing.assert_close(found, expected[:, stop - 1], rtol=1e-4, atol=1e-5)
    assert cache.length == 11


def test_a_later_token_changes_nothing_before_it() -> None:
    decoder = decoder_with(FEATURES["all"])
    batch = packed_batch([[12]])
    before = decoder(*batch.inputs)
    changed = batch.tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 97
    after = decoder(changed, batch.positions, batch.documents)
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=0, atol=1e-6)
    assert (after[:, 8:] - before[:, 8:]).abs().amax((0, 2)).min() > 1e-4


def test_the_plain_model_has_the_plain_decoders_keys_and_no_other() -> None:
    layer = ["attention_norm", "feed_forward_norm", *(f"attention.{x}" for x in "qkvo")]
    layer += [f"feed_forward.{x}" for x in ("gate", "up", "down")]
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer} | {
        "embedding.weight",
        "norm.weight",
        "head.weight",
    }
    assert set(decoder_with({}).state_dict()) == expected
    off = {"streams": {"count": 1}, "experts": {"count": 1}, "altup": {"blocks": 1}}
    assert set(decoder_with(off).state_dict()) == expected


def test_tied_embeddings_are_one_parameter() -> None:
    decoder = decoder_with({"tie_embeddings": True})
    assert decoder.head.weight is decoder.embedding.weight
    assert "head.weight" not in dict(decoder.named_parameters())


@every_feature
def test_the_loss_is_the_cross_entropy_of_the_logits(settings: dict[str, Any]) -> None:
    decoder, batch = decoder_with(settings), packed_batch([[5, 7], [12]])
    losses = batch.losses(decoder)
    expected = torch.nn.functional.cross_entropy(
        decoder(*batch.inputs).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(losses.lm, expected)
    assert not losses.token_losses[batch.labels.flatten() == IGNORED].any()


@every_feature
def test_every_parameter_learns(settings: dict[str, Any]) -> None:
    decoder = decoder_with(settings)
    losses = packed_batch([[40, 24], [64]]).losses(decoder)
    (losses.lm + sum(losses.auxiliary.values())).backward()
    silent = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_reports_are_named_by_layer_and_losses_are_summed() -> None:
    decoder, batch = decoder_with({"layers": 3, "experts": {"count": 4, "every": 2}}), packed_batch([[5, 7]])
    losses = batch.losses(decoder)
    assert sorted(losses.statistics) == ["moe/layer_00/load", "moe/layer_02/load"]
    assert all(load.sum() == 12 for load in losses.statistics.values())
    assert set(losses.auxiliary) == {"balance", "router_z"}
    assert losses.auxiliary["balance"] > 1.9  # two layers of about one


@pytest.mark.parametrize("name", ["qwen", "all", "wide", "sequence"])
def test_the_compiled_layers_agree(name: str) -> None:
    torch._dynamo.reset()
    batch, results = packed_batch([[5, 7], [12]]), []
    for compiled in (False, True):
        decoder = decoder_with(FEATURES[name])
        for layer in decoder.layers.values() if compiled else ():
            layer.compile(backend="aot_eager")
        losses = batch.losses(decoder)
        losses.lm.backward()
        results.append([losses.lm.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


def test_repetition_gives_the_same_bits() -> None:
    batch, results = packed_batch([[5, 7], [12]]), []
    for _ in range(2):
        decoder = decoder_with(FEATURES["all"])
        batch.losses(decoder).lm.backward()
        results.append([p.grad for p in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_helper_packs_as_the_data_room_does() -> None:
    batch: Batch = packed_batch([[2, 3]])
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1]]
    assert (batch.labels == IGNORED).tolist() == [[False, True, False, False, True]]
