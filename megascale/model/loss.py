"""The head and its cross entropy, in chunks of tokens, so that no [T, V] tensor exists.

T tokens, t of a chunk, d width, V vocabulary, v of its rows on this rank (all of them on one device).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megascale.model.exchange import whole_vocabulary

IGNORED = -100
"""The label of a token without a loss."""

JoinVocabulary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Log-sum-exp [t] and label logit [t] over the rows of this rank -> over all rows."""

CHUNK = 2048
"""Tokens whose logits exist at a time: large enough for full GEMM speed, small beside the activations of a layer."""


def _chunk_statistics(logits: Tensor, labels: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """log-sum-exp [t] and the label's logit [t] (0 where it is not among these rows), in fp32 (fp64 for fp64), of logits [t, v]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local = labels - first_row
    here = (local >= 0) & (local < logits.shape[1])
    chosen = wide.gather(-1, torch.where(here, local, 0)[:, None])[:, 0]
    return wide.logsumexp(-1), torch.where(here, chosen, 0.0)


def _chunk_gradient(logits: Tensor, labels: Tensor, normaliser: Tensor, scale: Tensor, first_row: int) -> Tensor:
    """d(scale * sum of losses) / d logits [t, v] in the dtype of the logits."""
    softmax = (logits - normaliser[:, None]).exp()
    hit = torch.arange(first_row, first_row + logits.shape[1], device=logits.device) == labels[:, None]
    factor = torch.where(labels == IGNORED, 0.0, scale)
    return ((softmax - hit.to(softmax.dtype)) * factor[:, None]).to(logits.dtype)


class LossKernels:
    """The element-wise parts of the loss; `compile` fuses each into one pass over the logits."""

    statistics = staticmethod(_chunk_statistics)
    gradient = staticmethod(_chunk_gradient)

    @classmethod
    def compile(cls) -> None:
        """Use torch.compile for them from now on."""
        cls.statistics = staticmethod(torch.compile(_chunk_statistics, dynamic=False))
        cls.gradient = staticmethod(torch.compile(_chunk_gradient, dynamic=False))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, while the logits exist (as Liger kernel does, arXiv 2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, first_row: int, join_vocabulary: JoinVocabulary
    ) -> tuple[Tensor, Tensor]:
        token_losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=token_losses.dtype) if ctx.needs_input_grad[1] else None
        )  # a frozen head has none
        for start in range(0, x.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            logits = x[part] @ weight.t()
            normaliser, chosen = join_vocabulary(*LossKernels.statistics(logits, labels[part], first_row))
            token_losses[part] = torch.where(labels[part] == IGNORED, 0.0, normaliser - chosen)
            if grad_x is None and grad_weight is None:
                continue
            gradient = LossKernels.gradient(logits, labels[part], normaliser, scale, first_row)
            if grad_x is not None:
                torch.mm(gradient, weight, out=grad_x[part])
            if grad_weight is not None:
                grad_weight += gradient.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() * scale, token_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_token_losses: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        to_x = None if grad_x is None else grad_x * grad.to(grad_x.dtype)
        to_weight = None if grad_weight is None else grad_weight * grad
        return to_x, to_weight, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    first_row: int = 0,
    join_vocabulary: JoinVocabulary = whole_vocabulary,
) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy of the logits x weight^T.

    Args:
        x: [T, d]; weight: [v, d], same dtype, rows first_row.. of the vocabulary.
        labels: int64 [T]; IGNORED where there is no loss.
        scale: fp32 scalar tensor that multiplies every token's loss, usually one over the number of loss tokens in the step.
        join_vocabulary: exchange point between the ranks that share the vocabulary.

    Returns: the scaled sum (scalar, differentiable by x and weight; the weight's gradient is fp32) and the losses [T] in nats. With a
        shared vocabulary both are the same on all its ranks, and the gradient of x is this rank's part of a sum over them.
    """
    return _LinearCrossEntropy.apply(x, weight, labels, scale, first_row, join_vocabulary)
