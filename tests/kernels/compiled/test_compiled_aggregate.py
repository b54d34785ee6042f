"""The kernels of the stream aggregation as GPUs would run them: nothing spills, tensors are read and written 128 bits at a time."""

from __future__ import annotations

import pytest
import torch
from gates import TARGETS, compile_launches
from torch import Tensor

from megascale.kernels.aggregate_triton import backward_hidden, backward_streams, forward

TOKENS = 16384


def absent(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("streams, width, weights_used", [(4, 4096, True), (8, 2048, False)], ids=["P=4", "P=8"])
def test_it_fits_and_reads_wide(
    streams: int, width: int, weights_used: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
    x, hidden, scores = absent(TOKENS, streams, width), absent(TOKENS, width), absent(TOKENS, streams, dtype=torch.float32)
    bias, mix_weight, mix_bias = absent(width), absent(streams, width), absent(streams)
    for binary in (
        *compile_launches(target, forward, x, hidden, bias, mix_weight, mix_bias, 0.1, 0),
        *compile_launches(target, backward_streams, hidden, scores if weights_used else None, x, scores, 0.1, 0),
        *compile_launches(target, backward_hidden, scores, hidden, bias, mix_weight),
    ):
        binary.check()
        binary.check_wide()
