"""Rates and utilisation of a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.observe.metrics import check_record
from megascale.observe.throughput import peak_flops, throughput


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_a_step_by_hand() -> None:
    metrics = throughput(2.0, 1000, flops=8e12, flops_full=10e12, flops_hardware=20e12, world=4, peak=10e12)
    assert metrics == {
        "perf/step_seconds": 2.0,
        "perf/tokens_per_second": 500.0,
        "perf/tokens_per_second_per_gpu": 125.0,
        "perf/tflops_per_gpu": 1.0,
        "perf/mfu": 0.1,
        "perf/mfu_full": 0.125,
        "perf/hfu": 0.25,
    }
    check_record(metrics)


def test_no_utilisation_without_a_known_peak() -> None:
    assert not any("fu" in name for name in throughput(1.0, 1, 1.0, 1.0, 1.0, 1, None))


@given(seconds=st.floats(1e-3, 1e3), world=st.integers(1, 4096), flops=st.floats(1.0, 1e20))
def test_device_rates_sum_to_the_whole(seconds: float, world: int, flops: float) -> None:
    metrics = throughput(seconds, 1000, flops, flops, flops, world, 989e12)
    assert metrics["perf/tokens_per_second_per_gpu"] * world == pytest.approx(metrics["perf/tokens_per_second"])
    assert metrics["perf/mfu"] * world * seconds * 989e12 == pytest.approx(flops)
