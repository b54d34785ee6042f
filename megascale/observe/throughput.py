"""Speed of a step: rates, achieved FLOP/s, and the share of the device's peak."""

from __future__ import annotations

import re

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("A100", 312e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
)
"""Dense bf16 tensor-core peak, FLOP/s, by the words of a device name; the first row whose words all occur wins.

Sources are NVIDIA's datasheets. They print bf16 with sparsity, twice the dense figure, except for the A100 (312 TFLOPS):
H100 1,979 (SXM), 1,671 (NVL), 1,513 (PCIe); H200 1,979 (SXM), 1,671 (NVL); HGX B200 36 PFLOPS on 8 devices.
"""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, FLOP/s. None when it is not known (a CPU, a device outside the table).

    Args:
        device_name: as the driver gives it, for example `NVIDIA H100 80GB HBM3`.
    """
    words = set(re.split(r"[\s_-]+", device_name.lower()))
    for name, peak in PEAK_FLOPS:
        if words.issuperset(name.lower().split()):
            return peak
    return None


def throughput(
    seconds: float, loss_tokens: int, flops: float, flops_full: float, flops_hardware: float, world: int, peak: float | None
) -> dict[str, float]:
    """The perf/* metrics of one step.

    Args:
        seconds: wall time of the step.
        loss_tokens: loss tokens of the step, over all ranks.
        flops: model FLOPs of the step over all ranks, attention counted where it is visible.
        flops_full: the same with full attention counted.
        flops_hardware: of what is computed, recomputation included.
        world: number of devices.
        peak: peak FLOP/s of one device; None leaves out the utilisations.

    Returns:
        Metrics by name. Utilisations are shares of the peak, 0 to 1.
    """
    assert seconds > 0
    assert world > 0
    device_seconds = seconds * world
    metrics = {
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": loss_tokens / seconds,
        "perf/tokens_per_second_per_gpu": loss_tokens / device_seconds,
        "perf/tflops_per_gpu": flops / device_seconds / 1e12,
    }
    if peak is not None:
        metrics["perf/mfu"] = flops / device_seconds / peak
        metrics["perf/mfu_full"] = flops_full / device_seconds / peak
        metrics["perf/hfu"] = flops_hardware / device_seconds / peak
    return metrics
