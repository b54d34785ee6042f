"""The only file that names devices and their communication backends."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Where a rank computes."""

    torch: torch.device
    backend: str
    """for torch.distributed; control messages always travel on CPU tensors"""

    @property
    def is_cpu(self) -> bool:
        return self.torch.type == "cpu"

    @property
    def is_meta(self) -> bool:
        """Shapes without memory: a dry run."""
        return self.torch.type == "meta"

    def name(self) -> str:
        """The device's model name, for throughput figures and reports."""
        if not self.is_cpu:
            return torch.cuda.get_device_name(self.torch)
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else "CPU"

    def synchronize(self) -> None:
        """Wait for the device's work (nothing to do on a CPU)."""
        if not self.is_cpu:
            torch.cuda.synchronize(self.torch)

    def memory(self) -> dict[str, float]:
        """Metrics of this process's memory in GiB: device peak, or the process's peak resident size on a CPU."""
        if not self.is_cpu:
            return {"memory/peak_gib": torch.cuda.max_memory_allocated(self.torch) / 2**30}
        return {"memory/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class HostCopies:
    """Copies of tensors in host memory, made again and again of tensors of the same shapes, such as a rank's part of a checkpoint.

    From an accelerator they go through pinned buffers, which are slow to make and are kept: the copies before are then overwritten. Those
    of CPU tensors belong to the caller alone.
    """

    def __init__(self, device: Device):
        self.device = device
        self.buffers: list[torch.Tensor] = []

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One copy of each, complete when this returns."""
        if self.device.is_cpu:
            return [tensor.detach().clone() for tensor in tensors]
        if [(x.shape, x.dtype) for x in self.buffers] != [(x.shape, x.dtype) for x in tensors]:
            self.buffers = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
        copies = [buffer.copy_(tensor.detach(), non_blocking=True) for buffer, tensor in zip(self.buffers, tensors, strict=True)]
        self.device.synchronize()
        return copies


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the kernel, whose page faults cost more than the arithmetic of a small step.

    An activation that is allocated anew in each step is otherwise mapped, faulted in page by page, and unmapped each time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        libc.mallopt(option, value)


def choose_device(local_rank: int, local_size: int) -> Device:
    """The accelerator of this local rank where one is visible, else the CPU with this rank's share of the cores.

    OMP_NUM_THREADS, where set, decides the threads instead.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return Device(device, "cpu:gloo,cuda:nccl")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // local_size, 1))
    _keep_freed_memory()
    return Device(torch.device("cpu"), "gloo")


def accelerator_profiling() -> list[torch.profiler.ProfilerActivity]:
    """What the profiler records here."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    return activities + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()


def record_memory_history(path: str | None) -> None:
    """Start recording allocations (path none), or write them to `path` and stop. Only devices with an allocator history have one."""
    if not torch.cuda.is_available():
        return
    if path is None:
        torch.cuda.memory._record_memory_history()
    else:
        torch.cuda.memory._dump_snapshot(path)
        torch.cuda.memory._record_memory_history(enabled=None)
