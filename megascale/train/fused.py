"""Which kernels the parts of a model run on: our Triton kernels, and attention's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from megascale.config.errors import InputError
from megascale.config.schema import Config
from megascale.kernels.flash import choose_flash

FUSED, WHY_PLAIN = "fused", "why_plain"
"""Modules with kernels have an attribute of the first name: none lets the device decide, False means plain PyTorch. Those whose kernels do
not take every shape have one of the second: why they have none for theirs."""


def use_kernels(modules: Sequence[nn.Module], choice: Literal["auto", "plain"], device: torch.device) -> str:
    """Let the parts of these models use their kernels, or not; in words, which do.

    Raises:
        InputError: there is a GPU and no triton.
    """
    parts = [part for module in modules for part in module.modules() if hasattr(part, FUSED)]
    if device.type == "cpu" or choice == "plain":
        for part in parts:
            setattr(part, FUSED, False)
        return f"plain PyTorch ({'kernels=plain' if choice == 'plain' else 'the Triton ones are for GPUs'})"
    if importlib.util.find_spec("triton") is None:
        raise InputError("kernels: auto", "triton is not installed", "install the triton of this torch, or set kernels=plain")
    import triton

    for part in parts:
        setattr(part, FUSED, None)
    reasons = {type(part).__name__: str(getattr(part, WHY_PLAIN, "")) for part in parts}
    names = ", ".join(sorted(name for name, reason in reasons.items() if not reason)) or "no part of this model has any"
    plain = "".join(f"; {name} is plain PyTorch: {reason}" for name, reason in sorted(reasons.items()) if reason)
    return f"triton {triton.__version__} ({names}){plain}"


def use_attention(config: Config, device: torch.device) -> str:
    """Let attention of this process run on the fastest flash kernel that is installed and fits the model; which that is, in words."""
    assert config.model.head_dim is not None
    return choose_flash(device, torch.bfloat16 if config.precision == "bf16" else torch.float32, config.model.head_dim)
