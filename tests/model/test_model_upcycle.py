"""Experts that start as copies of a dense feed-forward: the dense model's first loss."""

from __future__ import annotations

from typing import Any

import pytest

from megascale.config.errors import InputError
from megascale.config.schema import Model
from megascale.model.decoder import Decoder
from megascale.model.routers import ROUTERS
from megascale.model.upcycle import check_upcycling, dense_name, starts_as_dense, starts_at_zero
from tiny import packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[20, 12], [32]])


def expert_model(dense: Model, **experts: Any) -> Model:
    settings = {"count": 4, "per_token": 2, **experts}
    return dense.model_copy(update={"experts": tiny_model(experts=settings).experts})


def upcycled_decoder(dense: Decoder, model: Model) -> tuple[Decoder, set[str]]:
    """The expert decoder and the names of its new parameters."""
    check_upcycling(dense.config, model)
    decoder, new = tiny_decoder(model, seed=7), set()
    for name, parameter in decoder.named_parameters():
        source = dense_name(name, model)
        if source is None:
            new.add(name)
            if starts_at_zero(name):
                parameter.data.zero_()
        else:
            parameter.data.copy_(dense.get_parameter(source))  # experts: one for all
    return decoder, new


def first_loss(decoder: Decoder) -> float:
    return float(BATCH.losses(decoder).lm.detach())


SETTINGS: list[dict[str, Any]] = [
    *({"router": router, "per_token": 2} for router in ROUTERS),
    *({"router": router, "per_token": 1} for router in ("rl_r", "hash")),
    {"per_token": 3, "count": 5, "every": 2, "offset": 1},
    {"shared": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_first_loss_is_the_dense_models(settings: dict[str, Any]) -> None:
    dense = tiny_decoder(tiny_model(layers=3, streams={"count": 2, "prefix_tokens": 4}), spread=0.15)
    decoder, new = upcycled_decoder(dense, expert_model(dense.config, **settings))
    assert starts_as_dense(decoder.config.experts)
    assert all("router" in name or "shared" in name for name in new)
    expected = first_loss(dense)
    assert first_loss(decoder) == pytest.approx(expected, rel=1e-6)
    assert first_loss(decoder.eval()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"per_token": 1}, {"per_token": 1, "router": "s_base"}, {"capacity_factor": 0.5}, {"per_token": 1, "router": "sigmoid"}],
)
def test_gates_below_one_and_dropped_tokens_start_elsewhere_and_it_is_said(settings: dict[str, Any]) -> None:
    dense = tiny_decoder(tiny_model(), spread=0.15)
    decoder, _ = upcycled_decoder(dense, expert_model(dense.config, **settings))
    assert not starts_as_dense(decoder.config.experts)
    assert abs(first_loss(decoder) - first_loss(dense)) > 1e-4


@pytest.mark.parametrize(
    ("dense", "model", "place"),
    [
        (tiny_model(experts={"count": 2}), expert_model(tiny_model()), "model.experts"),
        (tiny_model(), tiny_model(), "model.experts.count"),
        (tiny_model(), expert_model(tiny_model(), width=32), "model.experts.width"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(dense: Model, model: Model, place: str) -> None:
    with pytest.raises(InputError) as error:
        check_upcycling(dense, model)
    assert error.value.place == place
