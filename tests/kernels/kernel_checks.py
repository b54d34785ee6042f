"""What the tests of Triton kernels share: inputs, poisoned memory, and how close a result has to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def choices(number: int, k: int, count: int, dropped: bool = True, seed: int = 0) -> Tensor:
    """Experts [N, k], `count` for none."""
    return torch.randint(0, count + dropped, (number, k), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def uncontiguous(x: Tensor) -> Tensor:
    """The same rows apart from each other, NaN between them."""
    room = torch.full((2 * x.shape[0], x.shape[1] + 8), torch.nan, dtype=x.dtype, device=x.device)
    room[::2, : x.shape[1]] = x
    return room[::2, : x.shape[1]]


def assert_as_good(found: Tensor, plain: Tensor, true: Tensor) -> None:
    """Within rounding of the truth, in fp64: in bf16 at most twice as far off as PyTorch, and an ulp of the largest."""
    error, scale = (found.double() - true).abs().max(), true.abs().max()
    if found.dtype in RELATIVE:
        assert error <= RELATIVE[found.dtype] * scale
    else:
        assert error <= 2 * (plain.double() - true).abs().max() + torch.finfo(found.dtype).eps * scale


def twice(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, the same bits on repetition."""
    first, second = function(*arguments), function(*arguments)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (first, second)), strict=True):
        a, b = (x.view(torch.uint8) if x.numel() else x for x in (a, b))  # poison is not equal to itself
        assert torch.equal(a, b)
    return first


def _spoil(x: Tensor) -> Tensor:
    return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 3) if x.device.type != "meta" else x


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty`, `empty_like` and `new_empty` return: NaN, and numbers that are no index."""

    def spoiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **options: _spoil(function(*arguments, **options))

    monkeypatch.setattr(torch, "empty", spoiled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", spoiled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", spoiled(torch.Tensor.new_empty))
