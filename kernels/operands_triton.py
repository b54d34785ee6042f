"""What launchers make of tensors for their kernels."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megascale.kernels.precision import wide_dtype


def compute_type(x: Tensor) -> tl.dtype:
    """`wide_dtype` of x, as Triton calls it: what a kernel casts to right behind each load."""
    return tl.float64 if wide_dtype(x) == torch.float64 else tl.float32


def dense_rows(x: Tensor) -> Tensor:
    """x with neighbours in the last dimension side by side; rows may be anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
