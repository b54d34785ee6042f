"""Named points where a module exchanges data with other ranks. On one device each is the identity.

A module owns its points as attributes; `megascale.parallel.apply` replaces them according to the layout, and nothing else in the model
differs between one process and a cluster.
"""

from __future__ import annotations

from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """The exchange point of one device."""
    return x
