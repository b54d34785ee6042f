"""The precision that sums and elementwise maths run in: fp32, and fp64 for fp64, which tests compare against."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in `wide_dtype`; x itself where it has it."""
    return x.to(wide_dtype(x))
