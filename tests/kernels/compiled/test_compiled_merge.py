"""The kernel that merges two parts of attention, as GPUs would run it."""

from __future__ import annotations

import pytest
import torch
from gates import TARGETS, compile_launches

from megascale.kernels.merge_triton import merge


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("heads, width, shared", [(16, 128, False), (16, 128, True), (32, 64, False)])
def test_it_fits_and_reads_wide(heads: int, width: int, shared: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
    tokens, streams = 16384, 4
    here = heads if shared else streams * heads
    out = torch.empty(tokens, here, width, dtype=torch.bfloat16, device="meta")
    more = torch.empty(streams, tokens, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    lse, more_lse = (torch.empty(shape, device="meta") for shape in ((tokens, here), (streams, heads, tokens)))
    (binary,) = compile_launches(target, merge, out, lse, more, more_lse)
    binary.check()
    binary.check_wide()
