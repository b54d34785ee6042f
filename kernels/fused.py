"""Whether a public function runs on its kernel."""

from __future__ import annotations

from torch import Tensor


def is_fused(x: Tensor, fused: bool | None, fits: bool = True) -> bool:
    """Whether a function of x uses its custom operator.

    Args:
        fused: none = on CUDA devices, where the kernel is made for what it gets; True = wherever x is, also where the operator has no
            kernel; False = plain PyTorch.
        fits: whether the kernel is made for x's shape.
    """
    return x.is_cuda and fits if fused is None else fused
