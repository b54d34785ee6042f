"""The stream aggregation, forward and backward: one operator against the published form and against plain token-major PyTorch, eager and
compiled. T tokens, P streams, d width (also the hidden width), u = the bytes of x [T, P, d].

The floor is the time of the three bare GEMMs at the rate measured here, and at the copy bandwidth measured here what must be moved beside
them: forward x and the hidden result read and y written, (1 + 2/P) u; backward x and y's gradient read and the hidden result exchanged for
its gradient, (1 + 3/P) u.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import form_rows, milliseconds
from megascale.kernels.aggregate import linear_aggregate_streams

SMOOTHING = 0.1
SHAPES = [(16384, 2, 2048), (16384, 4, 2048), (16384, 8, 2048), (8192, 4, 4096)]
SMALL_SHAPES = [(512, 4, 256)]
ROUNDS = 20


def published(x: Tensor, weight: Tensor, bias: Tensor, mix_weight: Tensor, mix_bias: Tensor) -> Tensor:
    """QwenLM/ParScale's form, of streams before tokens [P, T, d]: columns hidden-major, so that the streams are copied side by side."""
    joined = x.permute(1, 2, 0).flatten(1)
    scores = F.linear(F.silu(F.linear(joined, weight, bias)), mix_weight, mix_bias)
    weights = scores.float().softmax(-1) * (1 - SMOOTHING) + SMOOTHING / x.shape[0]
    return (x * weights.t()[..., None]).sum(0).to(x.dtype)


def token_major(*inputs: Tensor, fused: bool | None = None) -> Tensor:
    """Ours, of x [T, P, d]."""
    x, weight, bias, mix_weight, mix_bias = inputs
    return linear_aggregate_streams(x, weight, bias, mix_weight, mix_bias, SMOOTHING, fused=fused)[0]


def _inputs(tokens: int, streams: int, width: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    shapes = (tokens, streams, width), (width, streams * width), (width,), (streams, width), (streams,)
    scales = 1, (streams * width) ** -0.5, 1, width**-0.5, 1
    tensors = [torch.randn(s, generator=draw, device=device) * scale for s, scale in zip(shapes, scales, strict=True)]
    return [x.bfloat16().requires_grad_() for x in tensors]


def _train(form: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*inputs), inputs, grad)


def _gemms(x: Tensor, weight: Tensor, hidden: Tensor) -> None:
    rows = x.detach().flatten(1)
    torch.mm(rows, weight.detach().t())
    torch.mm(hidden, weight.detach())
    torch.mm(hidden.t(), rows)


def _shape_rows(device: torch.device, tokens: int, streams: int, width: int, rounds: int) -> list[dict[str, Any]]:
    inputs = _inputs(tokens, streams, width, device)
    stream_major = [inputs[0].detach().transpose(0, 1).contiguous().requires_grad_(), *inputs[1:]]
    grad = torch.randn(tokens, width, device=device).bfloat16()
    plain = partial(token_major, fused=False)
    torch._dynamo.reset()
    forms: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "ours": (token_major, inputs),
        "eager, published form": (published, stream_major),
        "eager, token-major": (plain, inputs),
        "compiled, published form": (torch.compile(published, dynamic=False), stream_major),
        "compiled, token-major": (torch.compile(plain, dynamic=False), inputs),
    }
    trains: dict[str, Callable[[], object]] = {
        name: partial(_train, form, tensors, grad) for name, (form, tensors) in forms.items()
    }
    copied = torch.empty_like(inputs[0], requires_grad=False)
    bare: dict[str, Callable[[], object]] = {
        "GEMMs": partial(_gemms, inputs[0], inputs[1], grad),
        "copy": lambda: copied.copy_(inputs[0].detach()),
    }
    times = milliseconds(device, trains | bare, rounds)
    size = tokens * streams * width * 2
    moved = size * (2 + 5 / streams)
    floor_ms = times["GEMMs"] + times["copy"] * moved / (2 * size)
    best = min((ms for name, ms in times.items() if name.startswith("compiled") and ms == ms), default=math.nan)
    floor = {"TFLOP": 6 * tokens * streams * width * width / 1e12, "GB": moved / 1e9}
    return form_rows(device, f"T={tokens} P={streams} d={width}", trains, times, floor_ms, floor, ("best compiled", best))


def rows(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The table: one row a shape and form, forward and backward in bf16. `small` is for seconds on a CPU, where ours is the plain form and
    only ratios mean something.
    """
    shapes, rounds = (SMALL_SHAPES, 5) if small else (SHAPES, ROUNDS)
    return [row for shape in shapes for row in _shape_rows(device, *shape, rounds)]
