"""Attention's prefix part merged into its causal part, once a layer in the forward pass: one kernel against plain PyTorch, eager and
compiled. T tokens, P streams, H heads, D head width. The floor is, at the copy bandwidth measured here, both parts read and one written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.measure import form_rows, milliseconds
from megascale.kernels.merge import Pair, merge_streams_by_lse

SHAPES = [(16384, 4, 16, 128), (8192, 8, 32, 128)]
SMALL_SHAPES = [(256, 2, 4, 64)]


def _shape_rows(device: torch.device, tokens: int, streams: int, heads: int, width: int, rounds: int) -> list[dict[str, Any]]:
    draw = torch.Generator(device).manual_seed(0)
    out = torch.randn(tokens, streams * heads, width, generator=draw, device=device).bfloat16()
    by_token = torch.randn(streams, tokens, heads, width, generator=draw, device=device).bfloat16()
    lse = torch.randn(tokens, streams * heads, generator=draw, device=device)
    more_lse = torch.randn(streams, heads, tokens, generator=draw, device=device)
    plain = partial(merge_streams_by_lse, fused=False)
    torch._dynamo.reset()
    forms: dict[str, Callable[..., Pair]] = {
        "ours": merge_streams_by_lse,
        "eager": plain,
        "compiled": torch.compile(plain, dynamic=False),
    }
    runs: dict[str, Callable[[], object]] = {
        name: partial(form, out, lse, by_token.transpose(1, 2), more_lse) for name, form in forms.items()
    }
    copied = torch.empty_like(out)
    times = milliseconds(device, runs | {"copy": lambda: copied.copy_(out)}, rounds)
    case, floor = f"T={tokens} P={streams} H={heads} D={width}", {"GB": 3 * out.numel() * 2 / 1e9}
    return form_rows(device, case, runs, times, 1.5 * times["copy"], floor, ("compiled", times["compiled"]))


def rows(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The table: one row a shape and form, in bf16. `small` is for seconds on a CPU, where ours is the plain form."""
    return [row for shape in (SMALL_SHAPES if small else SHAPES) for row in _shape_rows(device, *shape, 5 if small else 20)]
