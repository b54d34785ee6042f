"""The head and its cross entropy, in chunks of tokens, so that no [T, V] tensor exists. T tokens, d width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token without a loss."""

CHUNK = 2048
"""Tokens whose logits exist at a time: large enough for full GEMM speed, small beside the activations of a layer."""


def _chunk_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [t] and the softmax's normaliser [t] in fp32 (fp64 for fp64) of logits [t, V]; 0 where the label is IGNORED."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(-1)
    chosen = wide.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == IGNORED, 0.0, normaliser - chosen), normaliser


def _chunk_gradient(logits: Tensor, labels: Tensor, normaliser: Tensor, scale: Tensor) -> Tensor:
    """d(scale * sum of losses) / d logits [t, V] in the dtype of the logits."""
    softmax = (logits - normaliser[:, None]).exp()
    hit = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    factor = torch.where(labels == IGNORED, 0.0, scale)
    return ((softmax - hit.to(softmax.dtype)) * factor[:, None]).to(logits.dtype)


class LossKernels:
    """The element-wise parts of the loss; `compile` fuses each into one pass over the logits."""

    losses = staticmethod(_chunk_losses)
    gradient = staticmethod(_chunk_gradient)

    @classmethod
    def compile(cls) -> None:
        """Use torch.compile for them from now on."""
        cls.losses = staticmethod(torch.compile(_chunk_losses, dynamic=False))
        cls.gradient = staticmethod(torch.compile(_chunk_gradient, dynamic=False))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, while the logits exist (as Liger kernel does, arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        token_losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        grad_x = torch.empty_like(x) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=token_losses.dtype) if needs_gradient else None
        for start in range(0, x.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            logits = x[part] @ weight.t()
            token_losses[part], normaliser = LossKernels.losses(logits, labels[part])
            if grad_x is not None and grad_weight is not None:
                gradient = LossKernels.gradient(logits, labels[part], normaliser, scale)
                torch.mm(gradient, weight, out=grad_x[part])
                grad_weight += gradient.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() * scale, token_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_token_losses: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy of the logits x weight^T.

    Args:
        x: [T, d]; weight: [V, d], same dtype.
        labels: int64 [T]; IGNORED where there is no loss.
        scale: fp32 scalar tensor that multiplies every token's loss, usually one over the number of loss tokens in the step.

    Returns: the scaled sum (scalar, differentiable by x and weight; the weight's gradient is fp32) and the losses [T] in nats.
    """
    return _LinearCrossEntropy.apply(x, weight, labels, scale)
