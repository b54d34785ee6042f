"""The learning rate and the batch of every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config.schema import Batch, BatchStage, Schedule
from megascale.train.batch_stream import rank_share
from megascale.train.schedule import consumed_before, lr_scale, sequences_at


def scales(**settings) -> list[float]:
    schedule = Schedule(**settings)
    return [lr_scale(step, schedule) for step in range(1, schedule.steps + 1)]


@pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(shape: str) -> None:
    assert scales(steps=20, warmup_steps=4, shape=shape, decay_steps=5)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_to_the_final_share() -> None:
    found = scales(steps=12, warmup_steps=2, shape="cosine", final_lr=0.2)
    assert found[6] == pytest.approx(0.6)  # half way
    assert found[-1] == pytest.approx(0.2)
    assert found[2:] == sorted(found[2:], reverse=True)


def test_wsd_is_flat_and_then_falls_on_a_line() -> None:
    found = scales(steps=10, warmup_steps=2, shape="wsd", decay_steps=4, final_lr=0.2)
    assert found[1:6] == [1.0] * 5
    assert found[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_constant_stays() -> None:
    assert scales(steps=5, warmup_steps=0, shape="constant") == [1.0] * 5


@given(
    steps=st.integers(1, 40),
    warmup=st.integers(0, 40),
    decay=st.integers(1, 40),
    final=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_every_step_has_a_share_of_the_peak(steps: int, warmup: int, decay: int, final: float, shape: str) -> None:
    found = scales(steps=steps, warmup_steps=min(warmup, steps), decay_steps=decay, final_lr=final, shape=shape)
    assert all(0 <= scale <= 1 + 1e-12 for scale in found)


stages = st.lists(st.builds(BatchStage, steps=st.integers(1, 5), sequences=st.integers(1, 9)), max_size=4)


@given(ramp=stages, sequences=st.integers(1, 9), step=st.integers(1, 30))
def test_consumed_sequences_are_the_sum_of_the_batches_before(ramp: list[BatchStage], sequences: int, step: int) -> None:
    batch = Batch(sequences=sequences, ramp=tuple(ramp))
    assert consumed_before(step, batch) == sum(sequences_at(s, batch) for s in range(1, step))


def test_a_ramp_runs_through_its_stages() -> None:
    batch = Batch(sequences=8, ramp=(BatchStage(steps=2, sequences=2), BatchStage(steps=1, sequences=4)))
    assert [sequences_at(step, batch) for step in range(1, 6)] == [2, 2, 4, 8, 8]


@given(first=st.integers(0, 99), per_rank=st.integers(1, 4), micro=st.integers(1, 4), ranks=st.integers(1, 4))
def test_ranks_and_micro_batches_share_the_batch_without_gap_or_overlap(
    first: int, per_rank: int, micro: int, ranks: int
) -> None:
    size = per_rank * micro * ranks
    read = [i for m in range(micro) for rank in range(ranks) for i in rank_share(first, size, m, micro, rank, ranks)]
    assert read == list(range(first, first + size))


@given(micro=st.integers(1, 4), layout=st.sampled_from([(1, 4), (2, 2), (4, 1)]))
def test_a_micro_batch_holds_the_same_sequences_in_every_layout(micro: int, layout: tuple[int, int]) -> None:
    ranks, _ = layout
    for m in range(micro):
        together = [i for rank in range(ranks) for i in rank_share(7, 4 * micro, m, micro, rank, ranks)]
        assert together == list(rank_share(7, 4 * micro, m, micro, 0, 1))
