"""The ledger: what collectives cost a rank, on whose account they go, and the bytes of a step by formula."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ledgers import ledger_of_a_step
from megascale.config.schema import Model, Parallel
from megascale.parallel import collectives, plain
from megascale.parallel.charge import charged_to
from megascale.parallel.collectives import scatter_sum
from megascale.parallel.ledger import Entry, Ledger
from megascale.parallel.mesh import STAGE, open_mesh
from ranks import RankPool
from runs import ALL_AXES, one_process, tiny_config

BYTES = 40
"""of ten fp32 numbers"""


def every_collective(rank: int, size: int) -> tuple[list[Entry], list[int]]:
    """All kinds over the two ranks of tp, of a mesh of dp 2 x tp 2; and the same tensors without the ledger."""
    mesh = open_mesh(Parallel(tp=2), Model(), one_process(rank, size))
    group = mesh.group(mesh.along("tp"))
    x, two = torch.ones(10), torch.empty(20)
    with Ledger(mesh) as ledger:
        dist.all_reduce(x, group=group)
        dist.all_gather_into_tensor(two, x, group=group)
        dist.all_gather([torch.empty(10), torch.empty(10)], x, group=group)
        dist.reduce_scatter_tensor(torch.empty(10), two, group=group)
        dist.all_to_all_single(torch.empty(10), x, group=group)
        dist.broadcast(x, mesh.along("tp")[0], group=group)
        dist.all_reduce(x, group=mesh.group(mesh.along(*STAGE)))
        mesh.sum(x, "dp")
        mesh.world.sum(x)
        with charged_to("dp"):
            dist.all_reduce(x, group=group)
        works = [dist.isend(x, rank ^ 2), dist.irecv(torch.empty(10), rank ^ 2)]
        for work in works:
            work.wait()
    dist.all_reduce(x, group=group)
    return ledger.entries(), [int(two[0]), int(x[0])]


def test_every_collective_is_counted_once_on_its_account_and_runs(ranks: RankPool) -> None:
    for entries, values in ranks.run(every_collective, world_size=4):
        assert entries == [
            Entry("dp", "all-reduce", 2, 1, BYTES),
            Entry("ep", "all-to-all", 2, 1, BYTES),
            Entry("pp", "send", 4, 1, BYTES),
            Entry("stage", "all-reduce", 4, 1, BYTES),
            Entry("tp", "all-gather", 2, 2, 4 * BYTES),
            Entry("tp", "all-reduce", 2, 1, BYTES),
            Entry("tp", "broadcast", 2, 1, BYTES),
            Entry("tp", "reduce-scatter", 2, 1, 2 * BYTES),
            Entry("world", "all-reduce", 2, 1, BYTES),
            Entry("world", "all-reduce", 4, 1, BYTES),
        ]
        assert values == [2, 2 * 4 * 2 * 4 * 2 * 2]


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("send", 100)]
)
def test_bytes_that_leave_one_of_four_ranks_in_a_ring(kind: str, sent: int) -> None:
    assert Entry("tp", kind, 4, 1, 100).sent == sent


def test_a_real_step_sends_what_the_formulas_say(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    """Two stages of two layers on tp = 2 of fp32: T tokens of a micro-batch, P streams, K blocks, d width, n = 2 ranks."""
    micro_batches, layers, width, streams, blocks = 2, 2, 32, 2, 2
    tokens = 8 // micro_batches * 32
    config = tiny_config(
        tmp_path, tiny_corpus, "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}", ALL_AXES[0], ALL_AXES[2],
        "batch={sequences: 8, micro_batches: 2}", "parallel={pp: 2, tp: 2, zero_stage: 0}",
    )  # fmt: skip
    found = ranks.run(ledger_of_a_step, config.model_dump(), world_size=4)
    half, state = Fraction(1, 2), tokens * streams * width * 4
    # forward: attention and feed-forward gather and scatter [T, P, d] each; backward the other way round
    layer = (2 + 2) * half * state
    # in the first layer the streams are still one when attention gathers them
    first = half * (state - state // streams)
    # embedding: one scatter of [T, d], backward a gather; head: one gather of [T, d], backward a scatter
    end = half * tokens * width * 4
    for rank, entries in enumerate(found):
        sent = {(entry.axis, entry.kind): entry.sent for entry in entries}
        for kind in ("all-gather", "reduce-scatter"):
            assert sent["tp", kind] == micro_batches * (layers * layer + end - (first if rank < 2 else 0))
        # the state of this rank's half of the tokens, forward from the first stage, its gradient backward from the second
        assert sent["pp", "send"] == micro_batches * state * blocks // 2


def test_ranks_that_share_the_width_of_experts_send_what_the_formulas_say(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path
) -> None:
    """Two layers on tp = etp = 2 of fp32: a rank routes M copies of a micro-batch's tokens, E experts, n = 2 ranks."""
    micro_batches, layers, width, streams, experts, per_token = 2, 2, 32, 2, 4, 2
    copies = 8 // micro_batches * 32 // 2 * streams * per_token
    config = tiny_config(
        tmp_path, tiny_corpus, *ALL_AXES, "batch={sequences: 8, micro_batches: 2}", "parallel={tp: 2, etp: 2, zero_stage: 0}"
    )
    for entries in ranks.run(ledger_of_a_step, config.model_dump(), world_size=2):
        sent = {(entry.axis, entry.kind): entry.sent for entry in entries}
        # of two ranks each sends all its rows once: forward to experts, backward their gradients; and its numbers of rows by expert
        rows, numbers = copies * width * 4, experts * 8
        assert sent["etp", "all-gather"] == micro_batches * layers * (2 * rows + numbers)
        # forward and backward it sends the other rank's part of the sums
        assert sent["etp", "reduce-scatter"] == micro_batches * layers * 2 * rows
        assert not any(axis == "ep" for axis, _ in sent)


def test_context_and_stream_ranks_send_what_the_formulas_say(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    """Four layers on cp = 2 x stream = 2 of fp32: T tokens of a micro-batch, P = 2 streams of which a rank has one, n = 2 ranks."""
    micro_batches, layers, width, kv_width = 2, 4, 32, 2 * 8
    tokens, half = 8 // micro_batches * 32, Fraction(1, 2)
    config = tiny_config(
        tmp_path, tiny_corpus, "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}", ALL_AXES[0], ALL_AXES[2],
        "batch={sequences: 8, micro_batches: 2}", "parallel={stream: 2, cp: 2, zero_stage: 0}",
    )  # fmt: skip
    for entries in ranks.run(ledger_of_a_step, config.model_dump(), world_size=4):
        sent = {(entry.axis, entry.kind): entry.sent for entry in entries}
        # forward: keys and values of all tokens; backward: their gradients
        for kind in ("all-gather", "reduce-scatter"):
            assert sent["cp", kind] == micro_batches * layers * half * 2 * tokens * kv_width * 4
        # of this context rank's tokens: the aggregator's hidden layer, forward and backward; the weighted sum, and the sum of unit vectors
        # for the record; the gradient of the former
        state = tokens // 2 * width * 4
        assert sent["stream", "all-reduce"] == micro_batches * 2 * 2 * half * state
        assert sent["stream", "reduce-scatter"] == micro_batches * 2 * half * state
        assert sent["stream", "all-gather"] == micro_batches * half * state


def gradients_of_a_step(rank: int, size: int, settings: dict[str, Any], bucket: int) -> tuple[Fraction, Fraction]:
    """Bytes of gradients that leave a rank, and those of them that are exposed."""
    with mock.patch.object(plain, "BUCKET", bucket):
        (entry,) = [entry for entry in ledger_of_a_step(rank, size, settings) if entry.axis == "dp"]
    return entry.sent, entry.exposed


@pytest.mark.parametrize(("world", "pp"), [(2, 1), (4, 2)])
def test_gradients_are_exposed_unless_a_backward_pass_goes_on(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, world: int, pp: int
) -> None:
    layout = f"parallel={{zero_stage: 0, pp: {pp}}}"
    settings = tiny_config(tmp_path, tiny_corpus, "batch={sequences: 8, micro_batches: 2}", layout).model_dump()
    for sent, exposed in ranks.run(gradients_of_a_step, settings, 2**23, world_size=world):
        assert exposed == sent > 0  # one bucket, complete when the last backward pass ends
    for sent, exposed in ranks.run(gradients_of_a_step, settings, 1, world_size=world):
        # a bucket for each parameter; the embedding's gradient comes last. Stages end at different times: none is hidden
        assert exposed == (sent if pp > 1 else 300 * 32 * 4)


def a_scattered_sum(rank: int, size: int) -> list[float]:
    group = dist.group.WORLD
    assert group is not None
    x = torch.arange(2.0 * size)[:, None] * 10**rank
    with mock.patch.object(collectives, "_reduce_scatter", side_effect=AssertionError("gloo's is an all-reduce")):
        return scatter_sum(x, size, group.group_name).flatten().tolist()


def test_gloo_sends_what_a_reduce_scatter_should(ranks: RankPool) -> None:
    """All-to-all and a sum, half of what its own would send."""
    assert ranks.run(a_scattered_sum, world_size=4) == [[row * 1111.0 for row in (2 * rank, 2 * rank + 1)] for rank in range(4)]
