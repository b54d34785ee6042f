"""Whether a function runs on its kernel, on devices that are not here: tensors without values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megascale.kernels.fused import is_fused


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fits", [True, False])
def test_the_device_and_the_shape_decide_unless_one_is_told(device: str, fits: bool) -> None:
    with FakeTensorMode():
        x = torch.empty(2, device=device)
    assert is_fused(x, None, fits) is (device == "cuda" and fits)
    assert is_fused(x, True, fits)
    assert not is_fused(x, False, fits)
