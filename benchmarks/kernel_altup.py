"""AltUp's predict and correct, forward and backward: our kernels, the plain form, and what torch.compile makes of two ways to write it.

T tokens, K blocks, d width, one stream, bf16. The floor is a copy of as many bytes as must be moved, at the rate measured here: 2K + 1
blocks [T, d] forward and 3K + 2 backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import form_rows, milliseconds
from megascale.kernels.altup import altup_mix

SHAPES = [
    (16384, 2, 2048, False),
    (16384, 4, 2048, False),
    (16384, 8, 2048, False),
    (16384, 2, 2048, True),
    (16384, 4, 2048, True),
]
SMALL_SHAPES = [(512, 2, 256, False), (512, 4, 256, False), (512, 2, 256, True)]
COMPUTED = 1
"""the block that the layer computes on"""


def _einsum(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2301.13310 as it is written, in the state's precision."""
    p = (torch.eye(state.shape[2], device=state.device) + predict).to(state.dtype)
    static = predict.ndim == 2
    predicted = torch.einsum("ik,tpkd->tpid" if static else "tpik,tpkd->tpid", p, state)
    innovation = state[:, :, COMPUTED] + update - predicted[:, :, COMPUTED]
    return predicted + (1 + correct).to(state.dtype)[..., None] * innovation[:, :, None]


def _sums(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
    """The same as sums over blocks, which a compiler can fuse, in fp32."""
    blocks = [x.float() for x in state.unbind(2)]
    expected = [x + sum(predict[..., i, k, None] * blocks[k] for k in range(len(blocks))) for i, x in enumerate(blocks)]
    innovation = blocks[COMPUTED] + update.float() - expected[COMPUTED]
    new = [x + (1 + correct[..., i, None]) * innovation for i, x in enumerate(expected)]
    return torch.stack([x.to(state.dtype) for x in new], 2)


def _mix(fused: bool | None, state: Tensor, update: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
    return altup_mix(state, update, predict, correct, COMPUTED, False, fused)


def _forms(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    compiled = partial(torch.compile, dynamic=False)
    return {
        "ours": partial(_mix, None) if device.type == "cuda" else compiled(partial(_mix, False)),
        "plain, eager": partial(_mix, False),
        "plain, compiled": compiled(partial(_mix, False)),
        "einsum, eager": _einsum,
        "einsum, compiled": compiled(_einsum),
        "sums, compiled": compiled(_sums),
    }


def _train(form: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*inputs), inputs, grad)


def _shape_rows(device: torch.device, tokens: int, blocks: int, width: int, by_token: bool, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    state, grad, update = (draw(tokens, 1, *more, width).bfloat16() for more in ((blocks,), (blocks,), ()))
    outer = (tokens, 1) if by_token else ()
    inputs = [state, update, draw(*outer, blocks, blocks) / blocks, draw(*outer, blocks) / blocks]
    inputs = [x.requires_grad_() for x in inputs]
    moved = (5 * blocks + 3) * tokens * width * 2
    source, target = (torch.empty(moved // 2, dtype=torch.int8, device=device) for _ in range(2))
    torch._dynamo.reset()
    runs: dict[str, Callable[[], object]] = {name: partial(_train, form, inputs, grad) for name, form in _forms(device).items()}
    times = milliseconds(device, runs | {"floor": partial(target.copy_, source)}, rounds)
    case = f"T={tokens} K={blocks} d={width}{' by token' if by_token else ''}"
    return form_rows(device, case, runs, times, times["floor"], {"GB": moved / 1e9})


def rows(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The table: one row a shape and form. `small` is for seconds on a CPU, where ours is what runs there: the plain form, compiled."""
    return [row for shape in (SMALL_SHAPES if small else SHAPES) for row in _shape_rows(device, *shape, 5 if small else 30)]
