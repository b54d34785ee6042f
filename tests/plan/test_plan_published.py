"""The planner's errors on published runs stay within the goals; the transcribed tables agree with themselves."""

from __future__ import annotations

import pytest

from megascale.plan import megatron, published
from megascale.plan.cluster import load_cluster

FOUND = published.checks()


def test_every_row_is_checked() -> None:
    assert len(FOUND) == 10 + 12 + 4 * (2 + 3 + 4)


def test_goals_are_met_on_rows_that_were_not_fitted() -> None:
    fitted, judged, memory = published.summaries(FOUND)
    assert (fitted.kind, judged.kind, memory.kind) == ("time", "time", "memory")
    assert fitted.median < 0.05
    assert judged.median < 0.10
    assert memory.median < 0.07
    assert fitted.unexplained == judged.unexplained == memory.unexplained == 0


def test_half_of_the_time_rows_judge() -> None:
    fitted, judged, _ = published.summaries(FOUND)
    assert (fitted.rows, judged.rows) == (10 + 3 + 4, 9 + 4)


def test_a_slower_device_is_noticed() -> None:
    cluster = load_cluster("a100")
    slower = cluster.model_copy(update={"efficiency": cluster.efficiency.model_copy(update={"matmul": 0.55})})
    _, judged, _ = published.summaries(published.checks(slower))
    assert judged.median > 0.15


@pytest.mark.parametrize("row", published.read_rows("sc21_table1"), ids=lambda row: row["parameters_b"])
def test_sizes_of_the_first_table_give_its_parameters(row: dict[str, str]) -> None:
    """P = 12 L h^2 (1 + 13/(12 h) + (V + s)/(12 L h)), printed with one decimal."""
    assert published._run(row).parameters / 1e9 == pytest.approx(float(row["parameters_b"]), abs=0.06)


def test_activations_follow_the_papers_table() -> None:
    """arXiv 2205.05198, Table 2, a layer of GPT-3, t = 8: s b h (10 + 24/t + 5 a s / (h t)); with both techniques 34 s b h / t."""
    run = published._run(published.read_rows("recomputation")[1], recompute="none")
    size = 2048 * 12288
    assert megatron.layer_bytes(run) == pytest.approx(size * (10 + 24 / 8 + 5 * 96 * 2048 / 12288 / 8))
    both = published.replace(run, recompute="selective", sequence_parallel=True)
    assert megatron.layer_bytes(both) == pytest.approx(size * 34 / 8)


def test_the_bubble_shrinks_with_the_stages_of_a_rank() -> None:
    """A step of m micro-batches is m a + b; b, twice the time of m less that of 2 m, is the bubble: (p-1)/v of a stage's time."""
    cluster = load_cluster("a100").model_copy(update={"inter_node_bandwidth": 1e12, "inter_node_latency": 0.0})
    run = published._run(published.read_rows("recomputation")[1])
    assert (run.pp, run.dp) == (8, 1)
    bubbles = {}
    for stages in (1, 3):
        few = published.replace(run, interleave=stages)
        bubbles[stages] = 2 * megatron.iteration_seconds(few, cluster) - megatron.iteration_seconds(
            published.replace(few, batch=2 * few.batch), cluster
        )
    assert bubbles[1] == pytest.approx(3 * bubbles[3], rel=0.1)
