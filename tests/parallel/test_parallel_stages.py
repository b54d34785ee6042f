"""The stage cut: contiguous, none empty, and no other cut has a cheaper worst stage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.parallel.stages import cheapest_cut, stage_layers


def every_cut(layers: int, stages: int) -> Iterator[list[range]]:
    for borders in combinations(range(1, layers), stages - 1):
        yield [range(start, stop) for start, stop in pairwise([0, *borders, layers])]


def stage_costs(cut: list[range], costs: list[int], end: int) -> list[int]:
    return [sum(costs[layer] for layer in stage) + end * (stage is cut[-1]) for stage in cut]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 30))
def test_no_other_cut_has_a_cheaper_worst_stage(costs: list[int], stages: int, end: int) -> None:
    stages = min(stages, len(costs))
    found = cheapest_cut(tuple(costs), stages, end)
    assert [layer for stage in found for layer in stage] == list(range(len(costs)))

    def worse(cut: list[range]) -> tuple[Any, ...]:
        here = stage_costs(cut, costs, end)
        return max(here), sum(cost**2 for cost in here), [len(stage) for stage in cut]

    assert worse(found) == min(map(worse, every_cut(len(costs), stages)))


def test_equal_layers_are_shared_evenly_and_the_head_is_paid_for() -> None:
    assert [len(stage) for stage in cheapest_cut((10,) * 10, 4, 0)] == [2, 2, 3, 3]
    assert [len(stage) for stage in cheapest_cut((10,) * 10, 4, 2)] == [2, 3, 3, 2]
    assert [len(stage) for stage in cheapest_cut((10,) * 10, 4, 15)] == [3, 3, 3, 1]


def layers(pp: int, **model: Any) -> list[int]:
    """How many on each stage of a decoder whose head costs as much as about four of its layers."""
    sizes = {"width": 64, "layers": 16, "heads": 4, "ffn_width": 128, "vocab_size": 2500}
    config = resolve(Config.model_validate({"model": sizes | model, "data": {"sequence_length": 64}, "parallel": {"pp": pp}}))
    return [len(stage) for stage in stage_layers(config)]


def test_streams_make_the_head_cheaper_beside_the_layers() -> None:
    one, four = layers(4), layers(4, streams={"count": 4, "prefix_tokens": 8})
    assert one == [5, 5, 5, 1]
    assert four == [4, 4, 4, 4]


def test_experts_make_the_layers_that_have_them_dearer() -> None:
    experts = {"count": 8, "per_token": 4, "width": 256, "every": 4, "offset": 3}
    assert layers(2, experts=experts, vocab_size=64) == layers(2, vocab_size=64) == [8, 8]
    late = {**experts, "every": 16, "offset": 15}
    assert layers(2, experts=late, vocab_size=64)[1] < 8


def test_layers_on_every_fourth_token_are_cheaper() -> None:
    """Of Sequence-AltUp's layers all but the first and the last."""
    assert layers(2, layers=10, vocab_size=1000)[0] == 6
    assert layers(2, layers=10, vocab_size=1000, altup={"form": "sequence", "stride": 4})[0] > 6
