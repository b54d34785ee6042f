"""Step time: its messages are the dry run's ledger, its parts follow the settings, and it answers in the right direction."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import full_unless
from megascale.config.errors import InputError
from megascale.config.layout import pipeline_bubble
from megascale.plan.cluster import Cluster, Efficiency, load_cluster
from megascale.plan.costs import Group, collective_seconds, group, product_seconds
from megascale.plan.time import StepTime, step_time
from megascale.train.dry_run import dry_run
from plans import FINE, P2, P4, config_file, plan_of

RATE = 1e9
IDEAL = Cluster(
    name="one large node whose links carry 1e9 bytes/s, without latency",
    peak_flops=1e12,
    memory_bytes=1e12,
    memory_bandwidth=1e12,
    devices_per_node=4096,
    intra_node_bandwidth=RATE,
    inter_node_bandwidth=RATE,
    intra_node_latency=0.0,
    kernel_seconds=0.0,
    efficiency=Efficiency(intra_node=1.0, overlap=0.0, straggle=0.0),
)
H100 = load_cluster("h100")
MESSAGES: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp": (8, ("parallel={tp: 4}",)),
    "layer": (8, ("parallel={tp: 4, recompute: layer}",)),
    "cp": (8, ("parallel={cp: 2, tp: 2}",)),
    "ulysses": (8, ("parallel={cp: 2, context: ulysses}",)),
    "stream": (8, (P4, "parallel={stream: 2}")),
    "ep": (8, (FINE, "parallel={ep: 8, tp: 2}")),
    "etp": (8, (FINE, "parallel={ep: 4, tp: 2, etp: 2}")),
    "ep layer": (8, (FINE, "parallel={ep: 4, recompute: layer}")),
    "pp": (16, ("parallel={pp: 2, tp: 2}",)),
    "interleaved": (16, ("parallel={pp: 2, tp: 2, schedule: interleaved, virtual_stages: 2}",)),
    "zbv": (16, ("parallel={pp: 2, tp: 2, schedule: zbv}",)),
    "zero 0": (8, ("parallel={zero_stage: 0}",)),
    "zero 3": (8, ("parallel={zero_stage: 3}",)),
    "all axes": (16, (P2, "model.altup={blocks: 2}", FINE, "parallel={ep: 4, tp: 2, pp: 2}")),
}


def time_of(folder: Path, world: int, *overrides: str, cluster: Cluster = H100) -> StepTime:
    return step_time(plan_of(folder, world, *overrides), cluster)


@pytest.mark.parametrize("layout", full_unless(("tp", "ep", "pp", "zero 3"), MESSAGES))
def test_messages_are_those_of_the_ledger(tmp_path: Path, layout: str) -> None:
    """Where links carry a billion bytes a second and nothing overlaps, seconds are the bytes that one rank sends."""
    world, overrides = MESSAGES[layout]
    planned = time_of(tmp_path, world, *overrides, cluster=IDEAL)
    ranks = []
    for report in dry_run(config_file(tmp_path), overrides, world).ranks:
        axes = dict.fromkeys(("tp", "cp", "stream", "ep", "pp", "dp"), 0.0)
        for entry in report.sent:
            axis = "tp" if entry.axis == "etp" else entry.axis
            axes[axis] = axes.get(axis, 0.0) + float(entry.sent) / RATE
        ranks.append(axes)
    for axis in ("tp", "cp", "stream", "ep", "pp", "dp"):
        # the rank that binds is one of them; sums over tp of what its ranks hold whole, at most two percent, are left out
        assert min(abs(getattr(planned, axis) - rank[axis]) / max(rank[axis], 1e-3) for rank in ranks) < 0.02, axis


def test_one_device_is_bound_by_its_products(tmp_path: Path) -> None:
    time = time_of(tmp_path, 1)
    plan = plan_of(tmp_path, 1)
    assert 0.3 < plan.flops / time.total / H100.peak_flops < H100.efficiency.matmul
    assert time.binds in ("compute", "passes")
    assert (time.tp, time.ep, time.pp, time.dp, time.bubble, time.straggle) == (0, 0, 0, 0, 0, 0)
    assert sum(time.shares.values()) == pytest.approx(1)


def test_recomputation_costs_a_forward_pass(tmp_path: Path) -> None:
    kept, again = (time_of(tmp_path, 8, f"parallel={{recompute: {mode}}}") for mode in ("none", "layer"))
    assert kept.recompute == 0
    forward = (again.products + again.passes) / 3 + again.attention / 3.5
    assert 0.7 * forward < again.recompute < forward  # the head is not computed again


def test_the_bubble_is_the_schedules(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 16, "parallel={pp: 4, tp: 2}")
    time = step_time(plan, H100)
    busy = time.total - time.bubble - time.straggle - time.dp - time.optimizer
    assert time.bubble / (busy + time.bubble) == pytest.approx(pipeline_bubble(plan.config.parallel, plan.micro_batches))


@pytest.mark.parametrize(
    ("schedule", "waits"), [("{pp: 2, schedule: zbv}", 1 / 2), ("{pp: 4, schedule: interleaved, virtual_stages: 2}", 3 / 4)]
)
def test_one_micro_batch_leaves_all_ranks_but_one_waiting(tmp_path: Path, schedule: str, waits: float) -> None:
    plan = plan_of(tmp_path, 4, f"parallel={schedule}", "batch.micro_batches=1")
    assert pipeline_bubble(plan.config.parallel, 1) == pytest.approx(waits)


def test_a_skewed_router_makes_experts_and_messages_longer(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 8, FINE, "parallel={ep: 8}")
    even, skewed = step_time(plan, H100), step_time(plan, H100, imbalance=1.5)
    assert skewed.experts == pytest.approx(1.5 * even.experts, rel=0.1)
    assert skewed.ep == pytest.approx(1.5 * even.ep, rel=0.05)
    assert skewed.products == even.products


def test_tensor_parallelism_across_nodes_is_slow(tmp_path: Path) -> None:
    inside, across = (time_of(tmp_path, 16, f"parallel={{tp: {tp}}}", "batch.micro_batches=4") for tp in (8, 16))
    assert across.tp > 2 * inside.tp
    assert across.binds == "tp"


def test_streams_cost_no_messages_where_they_are_apart(tmp_path: Path) -> None:
    time = time_of(tmp_path, 8, P4, "parallel={stream: 4}")
    assert 0 < time.stream < 0.02 * time.total


def test_small_products_are_less_efficient() -> None:
    large, small = (product_seconds(H100, size, size, size) / size**3 for size in (8192, 256))
    assert small > 2 * large
    assert 2 / large < H100.peak_flops * H100.efficiency.matmul


def test_a_product_of_few_columns_is_bound_by_memory() -> None:
    ideal = H100.model_copy(update={"kernel_seconds": 0.0})
    moved = 2 * (8192 * 8192 + 2 * 8192)
    assert product_seconds(ideal, 8192, 1, 8192) >= moved / H100.memory_bandwidth / H100.efficiency.memory


def test_ranks_of_a_node_use_their_ports_together() -> None:
    alone, together = group(H100, 16, 8), group(H100, 16, 1)
    assert (alone.per_node, together.per_node) == (1, 8)
    slow, fast = (collective_seconds(H100, "all-gather", 1e9, members) for members in (alone, together))
    assert slow == pytest.approx(8 * fast, rel=0.2)
    assert collective_seconds(H100, "all-gather", 1e9, Group(8, 8)) < fast


def test_fp32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision: fp32 has another peak"):
        time_of(tmp_path, 8, "precision=fp32")


def test_a_vocabulary_that_only_the_corpus_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.vocab_size: is not set"):
        plan_of(tmp_path, 8, "model={width: 256}")
