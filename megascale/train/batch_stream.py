"""The micro-batches of every step, on this rank: contiguous shares of a sample order that knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megascale.config.schema import Batch
from megascale.data.batches import MicroBatch
from megascale.data.blend import Blend
from megascale.train.schedule import consumed_before, sequences_at


@dataclass(frozen=True)
class StepBatch:
    """What one rank reads in one step."""

    step: int
    micro_batches: list[MicroBatch]
    consumed: int
    """sequences of all ranks consumed once the step is done"""


def rank_share(first: int, sequences: int, micro_batch: int, micro_batches: int, rank: int, ranks: int) -> range:
    """Global indices of the sequences that a rank reads in one micro-batch of a step that starts at `first`."""
    per_micro_batch = sequences // micro_batches
    per_rank = per_micro_batch // ranks
    start = first + micro_batch * per_micro_batch + rank * per_rank
    return range(start, start + per_rank)


def step_batches(train: Blend, batch: Batch, first_step: int, last_step: int, rank: int, ranks: int) -> Iterator[StepBatch]:
    """The batches of steps first_step..last_step."""
    for step in range(first_step, last_step + 1):
        first, sequences = consumed_before(step, batch), sequences_at(step, batch)
        shares = (rank_share(first, sequences, m, batch.micro_batches, rank, ranks) for m in range(batch.micro_batches))
        yield StepBatch(step, [train.sequences(share) for share in shares], first + sequences)
