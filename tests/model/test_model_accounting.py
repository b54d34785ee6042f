"""Parameters and FLOPs: those of the real modules, and the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megascale.config.resolve import resolve
from megascale.config.schema import Config, Model, Streams
from megascale.kernels.attention import attention_reference
from megascale.kernels.grouped import grouped_linear_reference
from megascale.model import attention, routing
from megascale.model.accounting import flops_per_token, mean_visible_keys, parameters
from megascale.model.decoder import Decoder
from tiny import packed_batch, tiny_decoder, tiny_model

models = st.builds(
    lambda groups, queries, **rest: tiny_model(heads=groups * queries, kv_heads=groups, **rest),
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8]),
    layers=st.integers(1, 5),
    qkv_bias=st.booleans(),
    qk_norm=st.booleans(),
    tie_embeddings=st.booleans(),
    streams=st.fixed_dictionaries({"count": st.integers(1, 4), "prefix_tokens": st.integers(1, 6)}),
    experts=st.fixed_dictionaries(
        {
            "count": st.sampled_from([1, 2, 5]),
            "per_token": st.integers(1, 2),
            "every": st.integers(1, 2),
            "width": st.sampled_from([None, 24]),
            "shared": st.integers(0, 2),
        }
    ),
    altup=st.fixed_dictionaries({"blocks": st.integers(1, 3)}),
)


@settings(max_examples=40)
@given(model=models)
def test_parameters_are_those_of_the_module_part_by_part(model: Model) -> None:
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in Decoder(model).named_parameters()}

    def total(*words: str) -> int:
        return sum(size for name, size in sizes.items() if any(word in name for word in words))

    counted = parameters(model)
    assert counted.total == sum(sizes.values())
    assert counted.embedding == sizes["embedding.weight"]
    assert counted.head == sizes.get("head.weight", 0)
    assert counted.prefixes == total("prefix_")
    assert counted.aggregator == total("aggregator")
    assert counted.altup == total("residual")
    assert counted.routers == total("router")
    assert counted.feed_forward == total("feed_forward.") - total("router")
    assert counted.non_embedding == counted.total - counted.embedding - counted.head


HIDDEN_AND_FFN = {896: 4864, 1024: 5504, 1280: 6912, 1536: 8320, 2048: 11008, 2560: 13824}
PUBLISHED = {
    1: (535813376, 693753856, 1088376320, 1571472384, 2774773760, 4353203200),
    2: (538195842, 696738818, 1092762882, 1577522690, 2784937986, 4368529922),
    4: (540577412, 699722756, 1097148164, 1583571460, 2795100164, 4383854084),
    8: (545340552, 705690632, 1105918728, 1595669000, 2815424520, 4414502408),
}
"""Non-embedding parameters by P (arXiv 2505.10475, parametric_fit.py of its repository)."""


@pytest.mark.parametrize("streams", PUBLISHED)
def test_the_published_counts_of_parscale(streams: int) -> None:
    for (width, ffn_width), published in zip(HIDDEN_AND_FFN.items(), PUBLISHED[streams], strict=True):
        model = Model(
            vocab_size=151936,
            width=width,
            layers=36,
            heads=16,
            kv_heads=2,
            ffn_width=ffn_width,
            qkv_bias=True,
            tie_embeddings=True,
            streams=Streams(count=streams, prefix_tokens=48),
        )
        assert parameters(resolve(Config(model=model)).model).non_embedding == published


@pytest.fixture
def countable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain matrix products in place of the custom operators, which the counter does not know."""
    monkeypatch.setattr(attention, "attention", lambda *inputs: attention_reference(*inputs).contiguous())
    monkeypatch.setattr(routing, "grouped_linear", grouped_linear_reference)


@pytest.mark.usefixtures("countable")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": True, "qk_norm": True, "layers": 3, "kv_heads": 1},
        {"experts": {"count": 4, "per_token": 2, "shared": 1, "width": 16}},
        {"layers": 3, "experts": {"count": 4, "every": 2, "offset": 1}},
    ],
    ids=["plain", "qwen", "experts", "some layers routed"],
)
def test_flops_are_the_counted_matrix_products(settings: dict[str, Any]) -> None:
    """One document of S tokens; the counter sees all S keys of every query."""
    decoder, batch = tiny_decoder(tiny_model(**settings)), packed_batch([[24]])
    with FlopCounterMode(display=False) as counter:
        batch.losses(decoder).lm.backward()
    assert counter.get_total_flops() == 24 * flops_per_token(decoder.config, 24)


@pytest.mark.usefixtures("countable")
def test_flops_with_streams_count_prefixes_and_aggregator() -> None:
    decoder, batch = tiny_decoder(tiny_model(streams={"count": 3, "prefix_tokens": 5})), packed_batch([[24]])
    with FlopCounterMode(display=False) as counter:
        batch.losses(decoder).lm.backward()
    assert counter.get_total_flops() == 24 * flops_per_token(decoder.config, 24)


def test_blocks_cost_the_mix_alone() -> None:
    plain, wide = (flops_per_token(tiny_model(altup={"blocks": k}), 10) for k in (1, 3))
    assert wide - plain == 6 * 3**2 * 32 * 2


def test_visible_keys_count_the_token_itself_and_stop_at_the_window() -> None:
    assert mean_visible_keys(4.5, tiny_model()) == 5.5
    assert mean_visible_keys(4.5, tiny_model(sliding_window=3)) == 3
