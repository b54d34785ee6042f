"""What this machine offers a training run: versions, devices, memory, disk, compiler, W&B login."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "note", "FAILED"]
OK: Verdict = "ok"
NOTE: Verdict = "note"
FAILED: Verdict = "FAILED"

REQUIRED = ("torch", "deepspeed", "numpy", "tokenizers", "datasets", "safetensors", "pydantic", "wandb")
OPTIONAL = {"triton": "compiled kernels on GPUs", "transformers": "conversion of checkpoints"}
PYTHONS = ((3, 10), (3, 12))
TORCHES = ((2, 11), (2, 13))
_FREE_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """The verdict of one check: ok; note: works, but less well; FAILED: training will not work."""

    name: str
    verdict: Verdict
    text: str


def inspect_machine() -> list[Finding]:
    """All findings that need no training; only those of Python and the packages where one of them failed."""
    packages = [_python(), *_packages()]
    if any(finding.verdict == FAILED for finding in packages):
        return packages  # the other checks would need what is missing
    return [*packages, _torch_release(), *_device(), _memory(), _disk(), _wandb()]


def _python() -> Finding:
    good = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    return Finding("python", OK if good else FAILED, platform.python_version() + ("" if good else "; 3.10 to 3.12 is needed"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for package in REQUIRED:
        version = _version(package)
        findings.append(
            Finding(package, OK if version else FAILED, version or "is not installed; run `make quickstart` or pip install -e .")
        )
    for package, use in OPTIONAL.items():
        findings.append(Finding(package, OK, _version(package) or f"none; optional, for {use}"))
    return findings


def _torch_release() -> Finding:
    version = importlib.metadata.version("torch")
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    tested = TORCHES[0] <= release <= TORCHES[1]
    span = " to ".join(".".join(map(str, end)) for end in TORCHES)
    return Finding("torch release", OK if tested else NOTE, f"tested with {span}" + ("" if tested else f"; {version} is another"))


def _device() -> list[Finding]:
    import torch

    from megascale.parallel.device import choose_device
    from megascale.train.compiling import missing_compiler

    device = choose_device(0, 1)
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    missing = missing_compiler(device.torch)
    if missing:
        compiling = Finding("torch.compile", NOTE, f"training runs eagerly, which is slower: {missing}")
    else:
        compiling = Finding("torch.compile", OK, "a compiler is found")
    return [Finding("devices", OK, f"{count} x {device.name()}" if count else f"no accelerator; CPU {device.name()}"), compiling]


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    return Finding(
        "cores, memory", OK, f"{cores} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    scarce = "" if free >= _FREE_GIB else "; checkpoints may not fit"
    return Finding("disk", NOTE if scarce else OK, f"{free:.1f} GiB free here ({Path.cwd()}){scarce}")


def _wandb() -> Finding:
    from megascale.observe.wandb_sink import logged_in

    return Finding(
        "W&B", OK, "logged in" if logged_in() else "not logged in: runs are recorded offline; `wandb login` changes that"
    )
