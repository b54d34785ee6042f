"""The dispatch and SwiGLU kernels for four GPU families: nothing spills, rows are moved 128 bits at a time."""

from __future__ import annotations

import pytest
import torch
from gates import TARGETS, compile_launches
from torch import Tensor

from megascale.kernels import dispatch_triton, swiglu_triton

every_target = pytest.mark.parametrize("target", TARGETS)
TOKENS = 16384


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@every_target
@pytest.mark.parametrize(("k", "count"), [(8, 128), (8, 512)], ids=["small blocks", "large blocks"])
def test_sorting(target: str, k: int, count: int) -> None:
    binaries = compile_launches(target, dispatch_triton.sort_copies, meta(TOKENS, k, dtype=torch.int64), count)
    assert len(binaries) == 3  # launches
    for binary in binaries:
        binary.check()


@every_target
@pytest.mark.parametrize(("k", "width"), [(8, 2048), (2, 4096)])
def test_rows(target: str, k: int, width: int) -> None:
    copies, place = TOKENS * k, meta(TOKENS, k, dtype=torch.int64)
    x, y, gates = meta(TOKENS, width), meta(copies, width), meta(TOKENS, k, dtype=torch.float32)
    for launcher, arguments in (
        (dispatch_triton.write_copies, (x, place, copies)),
        (dispatch_triton.sum_copies, (y, place)),
        (dispatch_triton.sum_copies, (y, place, gates)),
        (dispatch_triton.weighted_sum_backward, (x, y, gates, place)),
    ):
        (binary,) = compile_launches(target, launcher, *arguments)
        binary.check()
        binary.check_wide()


@every_target
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_swiglu(target: str, weighted: bool) -> None:
    rows = TOKENS * 8
    hidden = meta(rows, 768)
    weights = (
        (meta(TOKENS, 8, dtype=torch.float32), meta(rows, dtype=torch.int64), meta(128, dtype=torch.int32)) if weighted else ()
    )
    for launcher, arguments in ((swiglu_triton.swiglu, (hidden, hidden)), (swiglu_triton.swiglu_backward, (hidden,) * 3)):
        (binary,) = compile_launches(target, launcher, *arguments, *weights)
        binary.check()
        binary.check_wide()
