"""From the host's memory to a device's."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; x itself where it is there already. From the host to an accelerator it goes through pinned memory: only then does
    the copy not wait for what the device still computes.
    """
    if x.is_cpu and device.type not in ("cpu", "meta"):
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
