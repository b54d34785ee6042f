"""The kernels of the stream aggregation as GPUs would run them: nothing spills, tensors are read and written 128 bits at a time."""

from __future__ import annotations

import pytest
import torch
from gates import TARGETS, compile_launches
from torch import Tensor

from megascale.kernels.aggregate_triton import backward_hidden, backward_streams, forward

TOKENS = 16384
SHAPES = [(4, 4096, 0, 4), (8, 2048, 0, 8), (8, 2048, 4, 4)]
"""P, d, the first stream here, their number."""


def absent(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("streams, width, first, here", SHAPES)
def test_it_fits_and_reads_wide(
    streams: int, width: int, first: int, here: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
    x, hidden, scores = absent(TOKENS, here, width), absent(TOKENS, width), absent(TOKENS, streams, dtype=torch.float32)
    bias, mix_weight, mix_bias = absent(width), absent(streams, width), absent(streams)
    grad_weights = None if first else scores
    for binary in (
        *compile_launches(target, forward, x, hidden, bias, mix_weight, mix_bias, 0.1, first),
        *compile_launches(target, backward_streams, hidden, grad_weights, x, scores, 0.1, first),
        *compile_launches(target, backward_hidden, scores, hidden, bias, mix_weight),
    ):
        binary.check()
        binary.check_wide()
