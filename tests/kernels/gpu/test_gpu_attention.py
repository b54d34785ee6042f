"""Packed attention on the device's flash kernels, in bf16: no further from one softmax in fp64 than twice plain bf16 maths."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from megascale.kernels import attention as module
from megascale.kernels.attention import attention, attention_reference

LENGTHS = (70, 1, 129, 64)


def inputs(device: torch.device, streams: int, width: int, slots: int) -> list[Tensor]:
    """q, k, v, prefix_k, prefix_v in bf16: two key/value heads, four query heads a stream."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), streams * heads, width) for heads in (4, 2, 2)] + [(streams, 2, slots, width)] * 2
    return [torch.randn(shape, generator=generator).bfloat16().to(device).requires_grad_() for shape in shapes]


def value_and_gradients(function, tensors: list[Tensor], window: int | None) -> list[Tensor]:
    device = tensors[0].device
    borders = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    out = function(*tensors[:3], borders, max(LENGTHS), window, *tensors[3:])
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def rounded_maths(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`math_forward` with weights in the precision of the values, as tensor cores take them."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("streams", [1, 4])
def test_attention_is_as_exact_as_plain_bf16_maths(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, streams: int, width: int, window: int | None
) -> None:
    tensors = inputs(device, streams, width, 48)
    exact = value_and_gradients(attention_reference, [x.detach().double().requires_grad_() for x in tensors], window)
    monkeypatch.setattr(module, "math_forward", rounded_maths)
    plain = value_and_gradients(attention_reference, tensors, window)
    monkeypatch.undo()
    found = value_and_gradients(attention, tensors, window)
    for got, rough, true in zip(found, plain, exact, strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= 2 * (rough.double() - true).abs().max() + ulp


def test_a_repetition_has_the_same_bits_forward(device: torch.device) -> None:
    tensors = inputs(device, 2, 64, 48)
    first, again = (value_and_gradients(attention, tensors, None)[0] for _ in range(2))
    assert torch.equal(first, again)
