"""Causal attention over packed documents, with ParScale prefixes merged by log-sum-exp; forward and backward on stock flash kernels.

    o1, l1 = attention(q, k, v, causal inside each document)       o2, l2 = attention(q, prefix_k[p], prefix_v[p], no mask)
    lse = logaddexp(l1, l2)                                        out = exp(l1 - lse) o1 + exp(l2 - lse) o2

The backward of each part is the stock kernel's, called with the merged (out, lse) as ring attention does (arXiv 2310.01889), so no keys
are concatenated, no mask is padded and prefixes need no copy per document. Keys of other ranks (context parallelism) come in the same way:
a span of queries here sees a span of them without a mask.

Shapes: T tokens (all documents one after the other), P streams, H query heads, G key/value heads, n prefix slots, D head width.
Streams are folded into heads: head p*H + h belongs to stream p. Where the streams do not differ yet (the first layer of ParScale), q, k
and v may come once, [T, H, D] and [T, G, D], with P prefixes: the causal part runs once, its backward once for each stream's (out, lse).
Context: keys and values of N tokens, [N, P*G, D], and spans, int64 [n, 4] on the host: tokens [a, b) here see all of context tokens [c, d).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megascale.kernels.flash import (
    Pair,
    flash_backward,
    flash_forward,
    has_flash,
    math_backward,
    math_forward,
    packed_flash_backward,
    packed_flash_forward,
)
from megascale.kernels.merge import merge_by_lse, merge_streams_by_lse, streams_first
from megascale.kernels.precision import wide_dtype

Context = tuple[Tensor, Tensor, Tensor]
"""Keys, values and spans, see above."""


PADDING = 64
"""Document lengths are rounded up to this many tokens: the CPU kernels compile themselves anew for each length they meet."""


class PrefixMaths:
    """Attention to the prefixes on a CPU as maths that is compiled: with so few keys torch's flash kernel and the merge take two to three
    times as long. None: there is no compiler, or it was not asked for.
    """

    merge: Callable[..., Pair] | None = None
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None

    @classmethod
    def compile(cls) -> None:
        """Use torch.compile for it from now on. Each shape is compiled for itself: with an open number of heads, as torch takes it to be
        once two layers differ, inductor's code for CPUs gives wrong sums in bf16 (torch 2.13).
        """
        cls.merge = staticmethod(torch.compile(merge_prefixes, dynamic=False))
        cls.gradients = staticmethod(torch.compile(math_backward, dynamic=False))


def merge_prefixes(out: Tensor, lse: Tensor, by_stream: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Pair:
    """out [T, P*H, D] and lse [T, P*H] of all keys, from those [T, H or P*H, ...] of the keys but the prefixes."""
    heads = by_stream.shape[1]
    here, here_lse = (streams_first(x, x.shape[1] // heads) for x in (out, lse))
    out, lse = merge_by_lse(here, here_lse, *math_forward(by_stream, prefix_k, prefix_v, None))
    return out.movedim(2, 0).flatten(1, 2).contiguous(), lse.movedim(2, 0).flatten(1, 2).contiguous()


def _batches(borders: Tensor, tokens: int) -> list[Tensor]:
    """The documents by rounded length: token numbers [documents, length] of each batch, `tokens` where a document is shorter."""
    edges = borders.long()
    starts, lengths = edges[:-1], edges.diff()
    rounded = -(-lengths // PADDING) * PADDING
    batches = []
    for length in rounded.unique().tolist():
        if length:
            here, steps = rounded == length, torch.arange(length, device=borders.device)
            batches.append(torch.where(steps < lengths[here, None], starts[here, None] + steps, tokens))
    return batches


def _take(x: Tensor, batch: Tensor) -> Tensor:
    """The batch's tokens of x [T, heads, ...], [documents, heads, length, ...], zeros where there is none; a view if it is all of x."""
    if batch.numel() == x.shape[0]:
        return x.view(*batch.shape, *x.shape[1:]).transpose(1, 2)
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[batch].transpose(1, 2)


def _put(whole: Tensor, batch: Tensor, part: Tensor) -> None:
    """Write [documents, heads, length, ...] to the batch's tokens of `whole` [T + 1, heads, ...], whose last row takes what is padding."""
    if batch.numel() == whole.shape[0] - 1:
        whole[:-1].view(*batch.shape, *whole.shape[1:]).copy_(part.transpose(1, 2))
    else:
        whole[batch] = part.transpose(1, 2)


def _packed_forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int) -> Pair:
    """out [T,H,D] and lse [T,H] of causal attention inside each document."""
    if has_flash(q):
        return packed_flash_forward(q, k, v, borders, longest, window)
    out = q.new_empty(q.shape[0] + 1, *q.shape[1:])
    lse = q.new_empty(out.shape[:2], dtype=wide_dtype(q))
    for batch in _batches(borders, q.shape[0]):
        part, part_lse = flash_forward(_take(q, batch), _take(k, batch), _take(v, batch), True, window)
        _put(out, batch, part)
        _put(lse, batch, part_lse)
    return out[:-1], lse[:-1]


def _packed_backward(grad, q, k, v, out, lse, borders: Tensor, longest: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    if has_flash(q):
        return packed_flash_backward(grad, q, k, v, out, lse, borders, longest, window)
    grads = [x.new_empty(x.shape[0] + 1, *x.shape[1:]) for x in (q, k, v)]
    for batch in _batches(borders, q.shape[0]):
        # a padded query has no gradient, out, lse or scores: its attention weights are exp(0), its contribution is zero
        views = [_take(x, batch) for x in (grad, q, k, v, out, lse)]
        parts = flash_backward(views[0], views[1], views[2], views[3], views[4], views[5], True, window)
        for whole, part in zip(grads, parts, strict=True):
            _put(whole, batch, part)
    return grads[0][:-1], grads[1][:-1], grads[2][:-1]


def _spans(spans: Tensor) -> list[list[int]]:
    """Those that are not empty."""
    return [span for span in spans.tolist() if span[0] < span[1] and span[2] < span[3]]


def _span_forward(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """out [m,H,D] and lse [m,H] of queries that all see all keys [n,G,D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = flash_forward(q, k, v, False)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _span_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `_span_forward` for the merged (out, lse)."""
    grad, q, k, v, out, lse = (x.transpose(0, 1)[None] for x in (grad, q, k, v, out, lse))
    return tuple(x[0].transpose(0, 1) for x in flash_backward(grad, q, k, v, out, lse, False))


def _document_forward(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int, context: Context | None, fused: bool
) -> Pair:
    """out [T,H,D] and lse [T,H] of all but the prefixes."""
    out, lse = _packed_forward(q, k, v, borders, longest, window)
    if context is None:
        return out, lse
    out = out.contiguous()
    keys, values, spans = context
    for a, b, c, d in _spans(spans):
        more, more_lse = _span_forward(q[a:b], keys[c:d], values[c:d])
        _, lse[a:b] = merge_streams_by_lse(out[a:b], lse[a:b], more.transpose(0, 1)[None], more_lse.t()[None], fused)
    return out, lse


def _document_backward(
    grad, q, k, v, out, lse, borders: Tensor, longest: int, window: int, context: Context | None
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, and with a context those of its keys and values, for the merged (out, lse)."""
    grads = _packed_backward(grad, q, k, v, out, lse, borders, longest, window)
    if context is None:
        return grads
    keys, values, spans = context
    grad_q, grad_keys, grad_values = grads[0], torch.zeros_like(keys), torch.zeros_like(values)
    for a, b, c, d in _spans(spans):
        more_q, more_keys, more_values = _span_backward(grad[a:b], q[a:b], keys[c:d], values[c:d], out[a:b], lse[a:b])
        grad_q[a:b] += more_q
        grad_keys[c:d] += more_keys
        grad_values[c:d] += more_values
    return grad_q, grads[1], grads[2], grad_keys, grad_values


def _context(keys: Tensor | None, values: Tensor | None, spans: Tensor | None) -> Context | None:
    return None if keys is None or values is None or spans is None else (keys.contiguous(), values.contiguous(), spans)


@torch.library.custom_op("megascale::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    keys: Tensor | None, values: Tensor | None, spans: Tensor | None, borders: Tensor, longest: int, window: int, fused: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q = q.contiguous()
    context = _context(keys, values, spans)
    out, lse = _document_forward(q, k.contiguous(), v.contiguous(), borders, longest, window, context, fused)
    if prefix_k is None or prefix_v is None:
        return out, lse
    streams, here = prefix_k.shape[0], k.shape[1] // prefix_k.shape[1]
    prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
    by_stream = streams_first(q, here).expand(streams, -1, -1, -1)
    if q.device.type == "cpu" and PrefixMaths.merge is not None:
        return PrefixMaths.merge(out, lse, by_stream, prefix_k, prefix_v)
    return merge_streams_by_lse(out.contiguous(), lse, *flash_forward(by_stream, prefix_k, prefix_v, False), fused)


@_attention.register_fake
def _(q, k, v, prefix_k, prefix_v, keys, values, spans, borders, longest, window, fused=True):
    heads = q.shape[1] if prefix_k is None else q.shape[1] * prefix_k.shape[0] * prefix_k.shape[1] // k.shape[1]
    wide = wide_dtype(q)
    return q.new_empty(q.shape[0], heads, q.shape[2]), q.new_empty(q.shape[0], heads, dtype=wide)


def _shared_backward(
    grad, q, k, v, out, lse, borders: Tensor, longest: int, window: int, context: Context | None
) -> tuple[Tensor, ...]:
    """`_document_backward`; for q, k, v that all streams share it runs stream by stream, and the gradients are summed in fp32."""
    streams = grad.shape[1] // q.shape[1]
    if streams == 1:
        return _document_backward(grad, q, k, v, out, lse, borders, longest, window, context)
    shared = (q, k, v) if context is None else (q, k, v, *context[:2])
    sums = [torch.zeros_like(x, dtype=wide_dtype(x)) for x in shared]
    for one in zip(*(x.chunk(streams, 1) for x in (grad, out, lse)), strict=True):
        one_grad, one_out, one_lse = (x.contiguous() for x in one)
        parts = _document_backward(one_grad, q, k, v, one_out, one_lse, borders, longest, window, context)
        for whole, part in zip(sums, parts, strict=True):
            whole += part
    return tuple(sums)


@torch.library.custom_op("megascale::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    keys: Tensor | None, values: Tensor | None, spans: Tensor | None,
    out: Tensor, lse: Tensor, borders: Tensor, longest: int, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    grad_q, *others = _shared_backward(grad, q, k, v, out, lse, borders, longest, window, _context(keys, values, spans))
    grad_k, grad_v, grad_keys, grad_values = (x.to(q.dtype) for x in (*others, q.new_empty(0), q.new_empty(0))[:4])
    if prefix_k is None or prefix_v is None:
        return grad_q, grad_k, grad_v, q.new_empty(0), q.new_empty(0), grad_keys, grad_values
    streams, here = prefix_k.shape[0], k.shape[1] // prefix_k.shape[1]
    prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
    views = [streams_first(x, streams) for x in (grad, out, lse)]
    by_stream = streams_first(q, here).expand(streams, -1, -1, -1)
    if q.device.type == "cpu" and PrefixMaths.gradients is not None:
        found = PrefixMaths.gradients(views[0], by_stream, prefix_k, prefix_v, views[1], views[2], None)
    else:
        found = flash_backward(views[0], by_stream, prefix_k, prefix_v, views[1], views[2], False)
    more_q, grad_prefix_k, grad_prefix_v = found
    if here < streams:
        more_q = more_q.sum(0, keepdim=True, dtype=grad_q.dtype)
    streams_first(grad_q, here).add_(more_q)
    prefix_grads = grad_prefix_k.contiguous(), grad_prefix_v.contiguous()
    return grad_q.to(q.dtype), grad_k, grad_v, *prefix_grads, grad_keys, grad_values


@_attention_backward.register_fake
def _(grad, q, k, v, prefix_k, prefix_v, keys, values, spans, out, lse, borders, longest, window):
    def like(x):
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(prefix_k), like(prefix_v), like(keys), like(values)


def _setup(ctx, inputs, output):
    q, k, v, prefix_k, prefix_v, keys, values, spans, borders, ctx.longest, ctx.window, _ = inputs
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, keys, values, spans, *output, borders)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _grad_lse):
    saved = ctx.saved_tensors
    grads = torch.ops.megascale.attention_backward(grad, *saved, ctx.longest, ctx.window)
    # of prefixes and context only those that there are
    there = [None if x is None else g for x, g in zip(saved[:7], grads, strict=True)]
    return *there, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int | None = None,
    prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, context: Context | None = None,
    fused: bool | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention inside each document, every token also seeing its stream's prefix, and spans of tokens keys from elsewhere.

    Args:
        q: [T, P*H, D]; k, v: [T, P*G, D], same dtype; with prefixes also [T, H, D] and [T, G, D], the same for all P streams. Scale is
            D^-0.5.
        borders: int32 [documents + 1], first token of each document and T at the end, on q's device.
        longest: no document is longer, tokens.
        window: a token sees itself and the window - 1 tokens before it; none = all. Prefixes stay visible.
        prefix_k, prefix_v: [P, G, n, D], without rotary (arXiv 2505.10475, section 3); none = plain attention.
        context: keys and values [N, ...] like k and v, and spans int64 [n, 4] on the host (see the module); not with a window.
        fused: False: parts are merged by PyTorch's own operators, on GPUs too.

    Returns: [T, P*H, D].
    """
    assert context is None or not window, "a window cuts through the keys of other ranks"
    return _attention(
        q, k, v, prefix_k, prefix_v, *(context or (None, None, None)), borders, longest, window or 0, fused is not False
    )[0]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int | None = None,
    prefix_k: Tensor | None = None, prefix_v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same by definition: one softmax over the concatenated prefix and document keys, differentiated by autograd."""
    streams = 1 if prefix_k is None else prefix_k.shape[0]
    tokens = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(tokens, borders[1:-1].to(tokens.dtype), right=True)
    distance = tokens[:, None] - tokens
    mask = (document[:, None] == document) & (distance >= 0) & (distance < (window or q.shape[0]))
    here = 1 if prefix_k is None else k.shape[1] // prefix_k.shape[1]
    queries, keys, values = (streams_first(x, here).expand(streams, -1, -1, -1) for x in (q, k, v))
    if prefix_k is not None and prefix_v is not None:
        keys, values = torch.cat([prefix_k, keys], 2), torch.cat([prefix_v, values], 2)
        mask = torch.cat([mask.new_ones(q.shape[0], prefix_k.shape[2]), mask], 1)
    out, _ = math_forward(queries, keys, values, mask)
    return out.movedim(2, 0).reshape(q.shape[0], -1, q.shape[2])
