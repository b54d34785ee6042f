"""Parameters and FLOPs: those of the real modules, and the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Model
from megascale.config.size import routed_layers
from megascale.kernels.attention import attention_reference
from megascale.kernels.grouped import grouped_linear_reference
from megascale.model import attention, routing
from megascale.model.accounting import (
    flops_per_token,
    hardware_flops_per_token,
    layer_flops_per_token,
    mean_visible_keys,
    parameters,
)
from megascale.model.decoder import Decoder, is_routed
from megascale.parallel.recompute import apply_recompute
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
    streams=st.fixed_dictionaries(
        {"count": st.integers(1, 4), "prefix_tokens": st.integers(1, 6), "reparameterise": st.sampled_from([None, 3])}
    ),
    experts=st.fixed_dictionaries(
        {
            "count": st.sampled_from([1, 2, 5]),
            "per_token": st.integers(1, 2),
            "every": st.integers(1, 2),
            "width": st.sampled_from([None, 24]),
            "shared": st.integers(0, 2),
            "router": st.sampled_from(["softmax", "sigmoid", "s_base", "rl_r", "hash"]),
        }
    ),
    altup=st.one_of(
        st.fixed_dictionaries(
            {
                "blocks": st.integers(1, 3),
                "form": st.sampled_from(["recycled", "wide"]),
                "coefficients": st.sampled_from(["static", "token"]),
            }
        ),
        st.just({"form": "sequence"}),
    ),
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


SHIPPED = Path(__file__).parents[2] / "configs" / "models"
PARSCALE = ("0.5b", "0.7b", "1.1b", "1.6b", "2.8b", "4.4b")
PUBLISHED = {
    1: (535813376, 693753856, 1088376320, 1571472384, 2774773760, 4353203200),
    2: (538195842, 696738818, 1092762882, 1577522690, 2784937986, 4368529922),
    4: (540577412, 699722756, 1097148164, 1583571460, 2795100164, 4383854084),
    8: (545340552, 705690632, 1105918728, 1595669000, 2815424520, 4414502408),
}
"""Non-embedding parameters by P (arXiv 2505.10475, parametric_fit.py of its repository)."""


@given(model=models, offset=st.integers(0, 5))
def test_the_checks_count_the_same_routed_layers_as_the_model(model: Model, offset: int) -> None:
    model = model.model_copy(update={"experts": model.experts.model_copy(update={"offset": offset % model.experts.every})})
    assert list(routed_layers(model)) == [layer for layer in range(model.layers) if is_routed(layer, model)]


def shipped(name: str, *overrides: str) -> Model:
    return resolve(load_config(SHIPPED / f"{name}.yaml", overrides).config).model


@pytest.mark.parametrize("streams", PUBLISHED)
def test_the_published_counts_of_parscale(streams: int) -> None:
    for size, published in zip(PARSCALE, PUBLISHED[streams], strict=True):
        model = shipped(f"parscale_{size}", f"model.streams.count={streams}")
        assert parameters(model).non_embedding == published


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama_3.2_1b", 1235814400), ("llama_3.1_8b", 8030261248), ("qwen3_30b_a3b", 30532122624)],
)
def test_the_published_counts_of_models_whose_architecture_is_ours(name: str, published: int) -> None:
    assert parameters(shipped(name)).total == published


@pytest.mark.parametrize(
    ("size", "published"),
    [("15m", 16527360), ("25m", 27279360), ("55m", 57369600), ("130m", 132163584), ("370m", 368123904), ("1.3b", 1308819456)],
)
def test_the_sizes_of_the_routed_laws_are_met_to_about_one_percent(size: str, published: int) -> None:
    """dense_parameter_count of arXiv 2202.01169, whose blocks differ from ours."""
    assert parameters(shipped(f"clark_{size}")).non_embedding == pytest.approx(published, rel=0.012)


@pytest.mark.parametrize("name", [path.stem for path in sorted(SHIPPED.glob("*.yaml")) if path.stem != "quickstart"])
def test_the_header_of_a_shipped_model_states_its_counts(name: str) -> None:
    model = shipped(name)
    counted, experts = parameters(model), model.experts
    idle = (experts.count - experts.per_token) * 3 * model.width * (experts.width or 0)
    active = counted.total - sum(is_routed(layer, model) for layer in range(model.layers)) * idle
    header = " ".join(line.removeprefix("# ") for line in (SHIPPED / f"{name}.yaml").read_text().splitlines() if line[0] == "#")
    assert f"{counted.total:,}" in header
    assert (f"{active:,} active" if active < counted.total else "all active") in header


@pytest.fixture
def countable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain matrix products in place of the custom operators, which the counter does not know."""
    monkeypatch.setattr(attention, "attention", lambda *inputs, fused: attention_reference(*inputs).contiguous())
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
        loss = batch.losses(decoder).lm
        assert loss is not None
        loss.backward()
    assert counter.get_total_flops() == 24 * flops_per_token(decoder.config, 24)


def counted_flops(recompute: str, **settings: Any) -> tuple[Model, float]:
    """Of a token of one document of 24, whose queries are counted with all keys."""
    decoder, batch = tiny_decoder(tiny_model(**settings)), packed_batch([[24]])
    apply_recompute(decoder, recompute)
    with FlopCounterMode(display=False) as counter:
        loss = batch.losses(decoder).lm
        assert loss is not None
        loss.backward()
    return decoder.config, counter.get_total_flops() / 24


THREE = {"streams": {"count": 3, "prefix_tokens": 5}}
PROJECTIONS = 2 * 32 * 8 * (4 + 2 * 2)
"""FLOPs of q, k, v of one token and stream, forward"""
ATTENTION = 4 * 4 * 8 * 24
"""of its scores and values, which the reference that is counted here does not share between streams"""


@pytest.mark.usefixtures("countable")
def test_flops_with_streams_count_prefixes_and_aggregator() -> None:
    model, counted = counted_flops("none", **THREE)
    assert counted == flops_per_token(model, 24) - 2 * 3 * PROJECTIONS  # layer 0 projects once
    assert counted == hardware_flops_per_token(model, 24, "none") + 2 * ATTENTION


@pytest.mark.usefixtures("countable")
def test_flops_of_recomputation_are_counted_again() -> None:
    model, counted = counted_flops("layer", **THREE)
    last = 2 * 64 * 32  # the last product of a layer: nobody needs its result again
    assert counted + 3 * 2 * last == hardware_flops_per_token(model, 24, "layer") + 4 * ATTENTION
    model, counted = counted_flops("stream", **THREE)
    assert counted + 3 * last == hardware_flops_per_token(model, 24, "stream")


@pytest.mark.parametrize("settings", [{}, {"experts": {"count": 4, "per_token": 2}}])
def test_without_streams_and_recomputation_the_hardware_computes_the_model(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    assert hardware_flops_per_token(model, 17, "none") == flops_per_token(model, 17)
    assert hardware_flops_per_token(model, 17, "layer") == flops_per_token(model, 17) + layer_flops_per_token(model, 17) / 3


@pytest.mark.usefixtures("countable")
def test_flops_of_a_frozen_trunk_leave_out_its_weights_gradients() -> None:
    """And what the streams share is computed once; the first layer's input needs no gradient either."""
    decoder, batch = tiny_decoder(tiny_model(layers=4, streams={"count": 3, "prefix_tokens": 5})), packed_batch([[24]])
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("prefix" in name or "aggregator" in name)
    with FlopCounterMode(display=False) as counter:
        loss = batch.losses(decoder).lm
        assert loss is not None
        loss.backward()
    model = decoder.config
    counted, formula = counter.get_total_flops(), 24 * flops_per_token(model, 24, frozen_trunk=True)
    inputs = 24 * 3 * 2 * model.width * model.head_dim * (model.heads + 2 * model.kv_heads)  # q, k, v of the first layer
    scores = 24 * 3 * 4 * model.heads * model.head_dim * 24
    computed = 24 * hardware_flops_per_token(model, 24, "none", frozen_trunk=True)
    assert computed - inputs - scores <= counted < formula < 24 * flops_per_token(model, 24)


def test_blocks_cost_the_mix_alone() -> None:
    plain, wide = (flops_per_token(tiny_model(altup={"blocks": k}), 10) for k in (1, 3))
    assert wide - plain == 6 * 3**2 * 32 * 2


def test_coefficients_of_the_token_cost_two_small_products_more() -> None:
    static, token = (flops_per_token(tiny_model(altup={"blocks": 3, "coefficients": c}), 10) for c in ("static", "token"))
    assert token - static == 6 * (2 * 3 * 32 + 3 * 3**2 + 3 * 3) * 2


@pytest.mark.usefixtures("countable")
@pytest.mark.parametrize("streams", [1, 3])
def test_a_wide_head_and_aggregator_are_counted(streams: int) -> None:
    """All but the mix, which the counter does not see."""
    settings = {"streams": {"count": streams, "prefix_tokens": 5}, "altup": {"blocks": 2, "form": "wide"}}
    model, counted = counted_flops("none", **settings)
    mix = streams * 6 * 2**2 * 32 * 2
    assert counted == hardware_flops_per_token(model, 24, "none") + (streams - 1) * ATTENTION - mix


@pytest.mark.usefixtures("countable")
@pytest.mark.parametrize("streams", [1, 3])
def test_strided_layers_are_counted_for_kept_tokens(streams: int) -> None:
    """One document of 24 tokens, every third kept; the counter sees all 24, or 8, keys."""
    settings = {"streams": {"count": streams, "prefix_tokens": 5}, "altup": {"form": "sequence", "stride": 3}}
    model, counted = counted_flops("none", layers=4, **settings)
    # 24 tokens of 24 keys are an average document of 47 tokens; of its kept ones each would see 8 + 1/3
    more = 2 * 12 * 4 * 8 * streams * (1 / 3) / 3
    computed = hardware_flops_per_token(model, 24, "none") + (streams - 1) * ATTENTION
    assert counted == pytest.approx(computed - more)


def test_visible_keys_count_the_token_itself_and_stop_at_the_window() -> None:
    assert mean_visible_keys(4.5, tiny_model()) == 5.5
    assert mean_visible_keys(4.5, tiny_model(sliding_window=3)) == 3
