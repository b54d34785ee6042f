"""What Triton makes of our launches for GPUs that this machine does not have: registers, spills, shared memory, width of accesses.

A launcher is called with tensors on the meta device; each launch it makes is compiled for the target, specialised as the launcher's own
arguments would be, and not run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300X."""
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""What one block may take at most: CUDA C++ Programming Guide, table of technical specifications per compute capability (163 KiB and
227 KiB); 64 KiB of LDS a workgroup on CDNA 3. Triton does not check it when it compiles."""


@dataclass(frozen=True)
class Binary:
    """One launch, compiled."""

    kernel: str
    target: str
    registers: int
    spilled: int
    """bytes of stack on Nvidia, registers on AMD"""
    shared: int
    """bytes"""
    wide_loads: int
    """instructions that load 128 bits of global memory"""
    loads: int
    """all instructions that load global memory"""
    wide_stores: int
    stores: int
    tensor_cores: bool

    def check(self) -> None:
        """Nothing is spilled, and a block's shared memory exists."""
        assert self.spilled == 0, f"{self} spills"
        assert self.shared <= SHARED_BYTES[self.target], f"{self} needs more shared memory than there is"

    def check_wide(self) -> None:
        """Tensors are read and written 128 bits at a time: most loads and stores are wide (scalars and indices are not)."""
        assert self.wide_loads > 0 and self.wide_stores > 0, f"{self}: narrow accesses"


class _AbsentDriver:
    """Stands for a GPU that is not there: enough for compiling."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> Any:
        return self._target.arch  # kernels are cached by device: each target is one

    def get_current_stream(self, device: object = 0) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda function, quantiles=None: [0.0] * 3


def _mock(argument: object) -> object:
    return MockTensor(argument.dtype, list(argument.shape)) if isinstance(argument, torch.Tensor) else argument


def compile_launches(target: str, launcher: Callable[..., object], *arguments: object, **options: object) -> list[Binary]:
    """Every launch of a call, compiled for a target. Tensors among the arguments are on the meta device. Behind it kernels run on this
    machine's GPU again, if it has one.
    """
    binaries: list[Binary] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        kernel = launch(self, *map(_mock, args), grid=grid, warmup=True, **{name: _mock(value) for name, value in kwargs.items()})
        binaries.append(_binary(self.fn.__name__, target, kernel))
        return kernel

    triton.runtime.driver.set_active(_AbsentDriver(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        launcher(*arguments, **options)
    finally:
        JITFunction.run = launch
        if torch.cuda.is_available():
            triton.runtime.driver.reset_active()
    return binaries


def _binary(name: str, target: str, kernel: Any) -> Binary:
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}:?\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
        wide_loads, wide_stores = (len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4", text)) for kind in ("load", "store"))
        loads, stores = (len(re.findall(rf"(?:global|buffer)_{kind}_", text)) for kind in ("load", "store"))
        return Binary(name, target, registers, spilled, shared, wide_loads, loads, wide_stores, stores, "v_mfma" in text)
    text = kernel.asm["ptx"]
    usage = _resource_usage(kernel.asm["cubin"])
    wide = r"{}\.global[.\w:]*\.(?:v4\.b32|v2\.b64)"
    wide_loads, wide_stores = (len(re.findall(wide.format(kind), text)) for kind in ("ld", "st"))
    loads, stores = (len(re.findall(rf"\b{kind}\.global", text)) for kind in ("ld", "st"))
    wide_loads += len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text))
    cores = any(word in text for word in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))
    return Binary(name, target, usage["REG"], usage["STACK"], shared, wide_loads, loads, wide_stores, stores, cores)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG and STACK of a binary, as the cuobjdump in Triton's wheel says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
