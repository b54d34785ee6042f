"""Attention over the union of two key sets from the attention over each, by their log-sum-exps (arXiv 2205.14135, section 3.1; as used
across devices in arXiv 2310.01889):

    lse = logaddexp(lse1, lse2)                                    out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2

In plain PyTorch that is a pass over memory for each product, the sum and the cast, four of them on fp32 temporaries; on a GPU one kernel
reads the two parts and writes the result. T tokens, P streams, H heads of a stream, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def merge_by_lse(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> Pair:
    """The merged parts, in plain PyTorch; out [..., D], lse [...]."""
    lse = torch.logaddexp(lse1, lse2)
    merged = out1 * (lse1 - lse).exp()[..., None] + out2 * (lse2 - lse).exp()[..., None]
    return merged.to(out1.dtype), lse


def streams_first(x: Tensor, streams: int) -> Tensor:
    """[T, P*H, ...] seen as [P, H, T, ...]."""
    return x.view(x.shape[0], streams, -1, *x.shape[2:]).movedim(0, 2)


def merge_streams_by_lse(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, fused: bool = True) -> Pair:
    """Merge into the attention over some keys that over others. Overwrites `out` where the streams of both are the same number.

    Args:
        out: [T, P*H, D], or [T, H, D] where it is the same for all streams; contiguous.
        lse: [T, P*H] or [T, H], fp32 (fp64 for fp64).
        more: [P, H, T, D], as out.
        more_lse: [P, H, T], as lse.
        fused: on a GPU by one kernel.

    Returns: out [T, P*H, D], lse [T, P*H].
    """
    assert out.is_contiguous()
    if fused and out.is_cuda:
        from megascale.kernels.merge_triton import merge

        return merge(out, lse, more, more_lse)
    streams, heads, tokens, width = more.shape
    here = out.shape[1] // heads
    merged, merged_lse = merge_by_lse(streams_first(out, here), streams_first(lse, here), more, more_lse)
    if out.shape[1] < streams * heads:
        out, lse = out.new_empty(tokens, streams * heads, width), lse.new_empty(tokens, streams * heads)
    streams_first(out, streams).copy_(merged)
    streams_first(lse, streams).copy_(merged_lse)
    return out, lse
