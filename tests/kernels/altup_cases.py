"""Inputs for AltUp's passes, and what they are by definition: Algorithm 1 of arXiv 2301.13310 in fp64, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Of `altup_mix`; `predict` of a row serves `altup_predict`."""

    state: Tensor
    update: Tensor
    predict: Tensor
    correct: Tensor
    computed: int
    predicted: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.state, self.update, self.predict, self.correct

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        new = dict(zip(("state", "update", "predict", "correct"), map(function, self.tensors), strict=True))
        return replace(self, **new)

    @property
    def row(self) -> Tensor:
        return self.predict[..., self.computed, :]

    def leaves(self) -> Inputs:
        """With gradients, same strides."""
        return self.map(lambda x: x.detach().requires_grad_())

    def call(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        return function(*self.tensors, self.computed, self.predicted, **options)


def altup_inputs(
    tokens: int,
    streams: int,
    blocks: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    by_token: bool = False,
    predicted: bool = False,
    shared: bool = False,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random; `shared`: the state has one stream. Coefficients are fp32, or fp64 with fp64 states."""
    generator = torch.Generator().manual_seed(blocks * width + tokens)
    here, narrow = 1 if shared else streams, torch.promote_types(dtype, torch.float32)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    predict = draw(*((tokens, here) if by_token else ()), blocks, blocks, dtype=narrow) / blocks
    correct = draw(*((tokens, streams) if by_token else ()), blocks, dtype=narrow) / 2
    state, update = draw(tokens, here, blocks, width), draw(tokens, streams, width)
    return Inputs(state, update, predict, correct, blocks - 1, predicted)


def mix_by_definition(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor, computed: int, predicted: bool) -> Tensor:
    """p = I + dp, g = 1 + dg: predict, compute block j, correct."""
    p, g = torch.eye(state.shape[2], dtype=predict.dtype, device=predict.device) + predict, 1 + correct
    expected = torch.einsum("tpik,tpkd->tpid", p.expand(*state.shape[:2], -1, -1), state)
    read = expected[:, :, computed] if predicted else state[:, :, computed]
    return expected + g[..., None] * (read + update - expected[:, :, computed])[:, :, None]


def predict_by_definition(state: Tensor, row: Tensor, computed: int) -> Tensor:
    """Row j of the prediction."""
    return state[:, :, computed] + torch.einsum("tpk,tpkd->tpd", row.expand(*state.shape[:2], -1), state)


def factors_like(x: Tensor) -> Tensor:
    """An incoming gradient."""
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).cos().view(x.shape).to(x.dtype).to(x.device)


def value_and_gradients(function: Callable[..., Tensor], *arguments: Any) -> list[Tensor]:
    """The result, and the gradients of the tensors among the arguments."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if isinstance(x, Tensor)], factors_like(out))]
