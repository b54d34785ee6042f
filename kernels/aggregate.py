"""ParScale's aggregation of the streams (arXiv 2505.10475, section 3.1) behind its first matrix product, as one operator.

    z = hidden + hidden_bias       s = mix_weight silu(z) + mix_bias       m = softmax(s)
    w = m (1 - eps) + eps / P      y = sum_p w_p x_p

and backward, of the gradients g of y and v of w (v is zero but where a loss uses the weights):

    u_p = <g, x_p> + v_p           s' = (1 - eps) m (u - <m, u>)           z' = (s' mix_weight) silu'(z)           x'_p = w_p g

Everything between the operator's inputs and outputs is computed in fp32 (fp64 for fp64) and rounded once. For the backward pass x, hidden
and m are kept; no tensor as large as x is made but its gradient. `linear_aggregate_streams` has the first matrix product in it: its
gradient of x is accumulated by that product's backward GEMM on top of x', which saves a pass over memory and a rounding.

T tokens, P streams of which P' are here (the others' parts of y are computed elsewhere), d width, h hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.kernels.fused import is_fused
from megascale.kernels.precision import wide_dtype, widen

Streams = tuple[Tensor, Tensor]
"""y [T, d] and w [T, P]."""


def _smooth(shares: Tensor, smoothing: float) -> Tensor:
    return shares * (1 - smoothing) + smoothing / shares.shape[-1]


def _reference_forward(
    x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float, first_stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, w and m by their definition."""
    active = F.silu(widen(hidden) + widen(hidden_bias))
    shares = F.linear(active, widen(mix_weight), widen(mix_bias)).softmax(-1)
    weights = _smooth(shares, smoothing)
    here = weights.narrow(1, first_stream, x.shape[1])
    return (here[..., None] * widen(x)).sum(1).to(x.dtype), weights, shares


def _reference_backward(
    grad_y: Tensor, grad_weights: Tensor | None, x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, shares: Tensor,
    smoothing: float, first_stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, hidden, hidden_bias, mix_weight, mix_bias, as written in the module."""
    here, wide_grad = slice(first_stream, first_stream + x.shape[1]), widen(grad_y)
    inner = torch.zeros_like(shares) if grad_weights is None else grad_weights.clone()
    inner[:, here] += (wide_grad[:, None] * widen(x)).sum(-1)
    grad_scores = (1 - smoothing) * shares * (inner - (shares * inner).sum(-1, keepdim=True))
    grad_x = _smooth(shares, smoothing)[:, here, None] * wide_grad[:, None]
    z = widen(hidden) + widen(hidden_bias)
    slope = z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    grad_hidden = grad_scores @ widen(mix_weight) * slope
    grads = grad_x.to(x.dtype), grad_hidden.to(hidden.dtype), grad_hidden.sum(0).to(hidden_bias.dtype)
    return *grads, (grad_scores.t() @ F.silu(z)).to(mix_weight.dtype), grad_scores.sum(0).to(mix_weight.dtype)


def _backward(
    grad_y: Tensor, grad_weights: Tensor | None, x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, shares: Tensor,
    smoothing: float, first_stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_reference_backward` on its device's best."""
    if not x.is_cuda:
        return _reference_backward(grad_y, grad_weights, x, hidden, hidden_bias, mix_weight, shares, smoothing, first_stream)
    from megascale.kernels.aggregate_triton import backward_hidden, backward_streams

    grad_x, grad_scores = backward_streams(grad_y, grad_weights, x, shares, smoothing, first_stream)
    grad_hidden, grad_hidden_bias, grad_mix = backward_hidden(grad_scores, hidden, hidden_bias, mix_weight)
    return grad_x, grad_hidden, grad_hidden_bias, grad_mix, grad_scores.sum(0).to(mix_weight.dtype, copy=True)


def _forward(
    x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float, first_stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.is_cuda:
        return _reference_forward(x, hidden, hidden_bias, mix_weight, mix_bias, smoothing, first_stream)
    from megascale.kernels.aggregate_triton import forward

    return forward(x, hidden, hidden_bias, mix_weight, mix_bias, smoothing, first_stream)


def _like_outputs(x: Tensor, mix_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape, wide = (x.shape[0], mix_weight.shape[0]), wide_dtype(x)
    return x.new_empty(x.shape[0], x.shape[2]), x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@torch.library.custom_op("megascale::aggregate", mutates_args=())
def _aggregate(
    x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float, first_stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, hidden, hidden_bias, mix_weight, mix_bias, smoothing, first_stream)


@_aggregate.register_fake
def _(x, hidden, hidden_bias, mix_weight, mix_bias, smoothing, first_stream):
    return _like_outputs(x, mix_weight)


@torch.library.custom_op("megascale::aggregate_backward", mutates_args=())
def _aggregate_backward(
    grad_y: Tensor, grad_weights: Tensor | None, x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, shares: Tensor,
    smoothing: float, first_stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(grad_y, grad_weights, x, hidden, hidden_bias, mix_weight, shares, smoothing, first_stream)


@_aggregate_backward.register_fake
def _(grad_y, grad_weights, x, hidden, hidden_bias, mix_weight, shares, smoothing, first_stream):
    return *_like(x, hidden, hidden_bias, mix_weight), mix_weight.new_empty(mix_weight.shape[0])


def _setup(ctx, inputs, output):
    x, hidden, hidden_bias, mix_weight, _, ctx.smoothing, ctx.first_stream = inputs
    ctx.save_for_backward(x, hidden, hidden_bias, mix_weight, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # the weights have a gradient in few losses


def _differentiate(ctx, grad_y, grad_weights, _grad_shares):
    saved = ctx.saved_tensors
    grad_y = _zeros_of_y(saved[0]) if grad_y is None else grad_y
    return *_aggregate_backward(grad_y, grad_weights, *saved, ctx.smoothing, ctx.first_stream), None, None


def _zeros_of_y(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], x.shape[2])


_aggregate.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("megascale::linear_aggregate", mutates_args=())
def _linear_aggregate(
    x: Tensor, weight: Tensor, bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    hidden = x.flatten(1) @ weight.t()
    return *_forward(x, hidden, bias, mix_weight, mix_bias, smoothing, 0), hidden


@_linear_aggregate.register_fake
def _(x, weight, bias, mix_weight, mix_bias, smoothing):
    return *_like_outputs(x, mix_weight), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("megascale::linear_aggregate_dgrad", mutates_args=())
def linear_aggregate_dgrad(
    grad_y: Tensor, grad_weights: Tensor | None, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, mix_weight: Tensor,
    shares: Tensor, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, of the first product's result, and of bias, mix_weight and mix_bias: all but that product's weight's."""
    grads = _backward(grad_y, grad_weights, x, hidden, bias, mix_weight, shares, smoothing, 0)
    grads[0].flatten(1).addmm_(grads[1], weight)
    return grads


@linear_aggregate_dgrad.register_fake
def _(grad_y, grad_weights, x, hidden, weight, bias, mix_weight, shares, smoothing):
    return *_like(x, hidden, bias, mix_weight), mix_weight.new_empty(mix_weight.shape[0])


@torch.library.custom_op("megascale::linear_aggregate_wgrad", mutates_args=())
def linear_aggregate_wgrad(grad_hidden: Tensor, x: Tensor) -> Tensor:
    """The gradient [h, P d] of the first product's weight."""
    return grad_hidden.t() @ x.flatten(1)


@linear_aggregate_wgrad.register_fake
def _(grad_hidden, x):
    return x.new_empty(grad_hidden.shape[1], x.shape[1] * x.shape[2])


def _setup_linear(ctx, inputs, output):
    x, weight, bias, mix_weight, _, ctx.smoothing = inputs
    _, _, shares, hidden = output
    ctx.save_for_backward(x, hidden, weight, bias, mix_weight, shares)
    ctx.mark_non_differentiable(shares, hidden)
    ctx.set_materialize_grads(False)


def _differentiate_linear(ctx, grad_y, grad_weights, _grad_shares, _grad_hidden):
    saved = ctx.saved_tensors
    grad_y = _zeros_of_y(saved[0]) if grad_y is None else grad_y
    grad_x, grad_hidden, *others = linear_aggregate_dgrad(grad_y, grad_weights, *saved, ctx.smoothing)
    grad_weight = linear_aggregate_wgrad(grad_hidden, saved[0]) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, *others, None


_linear_aggregate.register_autograd(_differentiate_linear, setup_context=_setup_linear)


MOST_STREAMS = 8
"""With more, the kernels' registers are spilled to memory."""


def why_plain(streams: int, width: int, inner: int) -> str:
    """Why the kernels are not made for P streams, d and h, in words; empty: they are."""
    if streams > MOST_STREAMS:
        return f"more than {MOST_STREAMS} streams"
    # rows of other widths have no aligned 16 bytes to load at a time
    return "widths that are no multiples of 16" if width % 16 or inner % 16 else ""


def _fits(x: Tensor, mix_weight: Tensor) -> bool:
    return not why_plain(mix_weight.shape[0], x.shape[2], mix_weight.shape[1])


def aggregate_streams(
    x: Tensor, hidden: Tensor, hidden_bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float, first_stream: int = 0,
    fused: bool | None = None,
) -> Streams:  # fmt: skip
    """y = sum_p w_p x_p over the streams here, and the weights w of all streams, see the module.

    Args:
        x: [T, P', d], the streams first_stream, first_stream + 1, ...
        hidden: [T, h], the first matrix product of all streams, without its bias, before SiLU; as x.
        hidden_bias: [h]
        mix_weight: [P, h]
        mix_bias: [P], as mix_weight.
        smoothing: eps, at least 0 and less than 1.
        first_stream: the number of x's first stream among the P.
        fused: whether one operator does it, or plain PyTorch in x's type; none: the operator on GPUs, for d and h that are multiples of 16
            and at most 8 streams.

    Returns: y [T, d] as x, and w [T, P] in fp32 (fp64 for fp64).
    """
    if is_fused(x, fused, _fits(x, mix_weight)):
        return _aggregate(x, hidden, hidden_bias, mix_weight, mix_bias, smoothing, first_stream)[:2]
    scores = F.linear(F.silu(hidden + hidden_bias), mix_weight, mix_bias)
    weights = _smooth(widen(scores).softmax(-1), smoothing)
    here = weights.narrow(1, first_stream, x.shape[1])
    return (here[..., None] * x).sum(1).to(x.dtype), weights


def linear_aggregate_streams(
    x: Tensor, weight: Tensor, bias: Tensor, mix_weight: Tensor, mix_bias: Tensor, smoothing: float, fused: bool | None = None
) -> Streams:
    """`aggregate_streams` of x [T, P, d], all streams, and of their product with weight [h, P d], whose column p d + j is for x[:, p, j].

    bias [h] is the product's; the other arguments and the results are those of `aggregate_streams`.
    """
    if is_fused(x, fused, _fits(x, mix_weight)):
        return _linear_aggregate(x, weight, bias, mix_weight, mix_bias, smoothing)[:2]
    return aggregate_streams(x, F.linear(x.flatten(1), weight), bias, mix_weight, mix_bias, smoothing, fused=False)
