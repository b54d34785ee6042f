"""AltUp's Triton kernels compiled for GPUs that are not here, at realistic sizes: bf16, d = 2048, T = 4096, P = 1 and 2."""

from __future__ import annotations

import pytest
import torch
from gates import TARGETS, compile_launches

from megascale.kernels import altup_triton

SHAPES = {
    "K=2": (1, 2, 2048, False),
    "K=2, by token": (2, 2, 2048, True),
    "K=4": (2, 4, 2048, False),
    "K=4, d=1552": (1, 4, 1552, False),
    "K=8": (1, 8, 2048, False),
}
"""P, K, d, whether coefficients depend on the token; 1552 is not a whole number of tiles"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_fits_and_moves_whole_vectors(shape: str, target: str) -> None:
    streams, blocks, width, by_token = SHAPES[shape]
    outer = (4096, streams) if by_token else ()
    state, update = (torch.empty(4096, streams, *more, width, dtype=torch.bfloat16, device="meta") for more in ((blocks,), ()))
    predict, correct = (torch.empty(*outer, *size, device="meta") for size in ((blocks, blocks), (blocks,)))
    predicted = blocks == 2
    binaries = [
        *compile_launches(target, altup_triton.mix, state, update, predict, correct, 1, predicted),
        *compile_launches(target, altup_triton.mix_backward, state, state, update, predict, correct, 1, predicted),
    ]
    if predicted:
        row = predict[..., 1, :]
        binaries += compile_launches(target, altup_triton.predict, state, row, 1)
        binaries += compile_launches(target, altup_triton.predict_backward, update, state, row, 1)
    assert len(binaries) == 2 + (not by_token) + 2 * predicted
    for binary in binaries:
        binary.check()
        if binary.kernel == "_mix_coefficients_kernel":  # one program, a few numbers
            continue
        if blocks <= 4 or binary.kernel == "_mix_kernel":  # more blocks go backward in vectors of 8 bytes, see `mix_backward`
            binary.check_wide()
        if binary.kernel == "_mix_kernel" and not by_token:
            assert binary.wide_loads == blocks + 1, "every block is loaded once, before the first store"
            assert binary.wide_stores == blocks
