"""Clusters: the shipped ones load, and agree with the peaks that runs are measured by; wrong files are refused with place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.errors import InputError
from megascale.observe.throughput import peak_flops
from megascale.plan.cluster import CLUSTERS, load_cluster

NAMES = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def test_there_are_four_clusters() -> None:
    assert NAMES == ["a100", "b200", "h100", "h200"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_clusters_have_the_peaks_of_the_metrics(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.peak_flops == peak_flops(name)
    assert 0 < cluster.usable_bytes < cluster.memory_bytes


def test_an_unknown_cluster_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"cluster v100: .*\n.*a100, b200, h100, h200"):
        load_cluster("v100")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("peak_flops: -1", r"peak_flops \(line \d+\) .*greater than.*given -1"),
        ("peak_flop: 1e15", r"peak_flop \(line \d+\) is unknown"),
        ("efficiency: {matmul: 1.2}", r"efficiency.matmul .*less than or equal to 1"),
        ("reserved_bytes: 9e12", "leave nothing of memory_bytes"),
        ("devices_per_node: 0", "devices_per_node .*greater than 0"),
    ],
)
def test_impossible_values_are_refused_with_their_line(tmp_path: Path, line: str, reason: str) -> None:
    rest = [row for row in (CLUSTERS / "h200.yaml").read_text().splitlines() if not row.startswith(("efficiency", " "))]
    kept = [row for row in rest if row.split(":")[0] != line.split(":")[0]]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(InputError, match=reason):
        load_cluster(str(path))


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(InputError, match="peak_flops is missing.*memory_bandwidth is missing"):
        load_cluster(str(path))
