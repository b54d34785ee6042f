"""Parameter groups: who decays, who is frozen, who goes to Muon."""

from __future__ import annotations

import pytest

from megascale.config.errors import InputError
from megascale.config.schema import Muon, Optimizer, ParameterGroup
from megascale.parallel.engine import OptimizerGroup
from megascale.train.groups import check_patterns, optimizer_groups
from tiny import tiny_decoder, tiny_model

EVERYTHING = {"streams": {"count": 2}, "experts": {"count": 4, "shared": 1}, "altup": {"blocks": 2}, "qkv_bias": True}


def grouped(*groups: ParameterGroup, model: dict | None = None, **settings) -> dict[str, OptimizerGroup]:
    decoder = tiny_decoder(tiny_model(**(EVERYTHING if model is None else model)))
    found = optimizer_groups(decoder.named_parameters(), Optimizer(groups=groups, **settings))
    return {group.name: group for group in found}


def owner(groups: dict[str, OptimizerGroup]) -> dict[str, str]:
    return {name: group.name for group in groups.values() for name in group.parameters}


def test_every_parameter_is_in_one_group() -> None:
    groups = grouped()
    names = [name for group in groups.values() for name in group.parameters]
    assert len(names) == len(set(names)) == len(list(tiny_decoder(tiny_model(**EVERYTHING)).parameters()))


def test_built_in_groups_and_their_decay() -> None:
    groups = grouped(weight_decay=0.3)
    decays = {name: group.weight_decay for name, group in groups.items()}
    expected = {"embeddings": 0.3, "head": 0.3, "matrices": 0.3, "prefixes": 0.0, "routers": 0.0, "scalars": 0.0}
    assert decays == expected
    of = owner(groups)
    assert of["layers.0.attention.prefix_k"] == "prefixes"
    assert of["layers.0.feed_forward.router.weight"] == "routers"
    assert of["layers.0.feed_forward.gate"] == of["aggregator.mix.weight"] == "matrices"
    for name in ("layers.0.residual.predict", "layers.0.residual.correct", "layers.0.attention.q.bias", "norm.weight"):
        assert of[name] == "scalars"


def test_the_first_matching_pattern_wins_and_vectors_in_it_do_not_decay() -> None:
    first = ParameterGroup(pattern="layers.0.*", lr_scale=0.5)
    second = ParameterGroup(pattern="layers.*", weight_decay=0.7)
    groups = grouped(first, second, lr=0.1, weight_decay=0.3)
    of = owner(groups)
    assert of["layers.0.attention.q.weight"] == "group_0"
    assert of["layers.0.attention_norm.weight"] == "group_0_vectors"
    assert of["layers.1.attention.q.weight"] == "group_1"
    assert of["embedding.weight"] == "embeddings"
    assert groups["group_0"].lr == pytest.approx(0.05)
    assert (groups["group_0"].weight_decay, groups["group_0_vectors"].weight_decay) == (0.3, 0.0)
    assert {groups[name].weight_decay for name in ("group_1", "group_1_vectors")} == {0.7}


def test_frozen_parameters_are_in_no_group_and_take_no_gradient() -> None:
    decoder = tiny_decoder(tiny_model())
    frozen = ParameterGroup(pattern="layers.0.*", frozen=True)
    groups = optimizer_groups(decoder.named_parameters(), Optimizer(groups=(frozen,)))
    names = {name for group in groups for name in group.parameters}
    assert not any(name.startswith("layers.0.") for name in names)
    assert {name for name, p in decoder.named_parameters() if not p.requires_grad} == {
        name for name, _ in decoder.named_parameters() if name.startswith("layers.0.")
    }


def test_muon_takes_whole_matrices_inside_the_layers() -> None:
    groups = grouped(name="muon", lr=0.001, muon=Muon(lr=0.02, weight_decay=0.01))
    muon = {name for group in groups.values() if group.optimizer == "muon" for name in group.parameters}
    layer = [f"attention.{x}.weight" for x in "qkvo"] + [f"feed_forward.{x}" for x in ("gate", "up", "down")]
    layer += [f"feed_forward.shared.{x}.weight" for x in ("gate", "up", "down")]
    assert muon == {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert {(g.lr, g.weight_decay) for g in groups.values() if g.optimizer == "muon"} == {(0.02, 0.01)}
    assert {g.lr for g in groups.values() if g.optimizer == "adamw"} == {0.001}


NAMES = ("embedding.weight", "layers.0.attention.q.bias")


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"optimizer.groups.1.pattern: 'layer.\*' matches no parameter\n  -> names look like embedding"
    ):
        check_patterns(Optimizer(groups=(ParameterGroup(pattern="*.bias"), ParameterGroup(pattern="layer.*"))), NAMES)


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        grouped(ParameterGroup(pattern="*", frozen=True))
