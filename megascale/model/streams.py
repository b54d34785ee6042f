"""What makes ParScale's streams differ and what joins them again (arXiv 2505.10475). T tokens, P streams, d width, n prefix slots,
G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.kernels.aggregate import aggregate_streams, linear_aggregate_streams, why_plain
from megascale.model.exchange import Exchange, Split, identity


class PrefixNetwork(nn.Module):
    """A layer's prefixes as the output of a small network in training: k, v = linear(tanh(linear(embedding))) for each stream and slot.

    Prefix tuning's reparameterisation (arXiv 2101.00190, section 4.3). ParScale's authors say that they trained with one; its sizes are
    not published. Our choices: each layer has a network of its own (prefix tuning: one for all), so that stages and heads are split as
    without it, and the embedding is as wide as the hidden layer. Evaluation and export see the output alone (`checkpoint/fold.py`).
    """

    def __init__(self, model: Model):
        super().__init__()
        hidden, kv_heads = model.streams.reparameterise, model.kv_heads
        assert hidden is not None and kv_heads is not None and model.head_dim is not None
        self.head_dim = model.head_dim
        self.embedding = nn.Parameter(torch.empty(model.streams.count, model.streams.prefix_tokens, hidden))
        self.hidden = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, kv_heads * self.head_dim)
        self.value = nn.Linear(hidden, kv_heads * self.head_dim)
        by_head = Split(0, "tp", kv_heads)
        self.splits = {f"{name}.{kind}": by_head for name in ("key", "value") for kind in ("weight", "bias")}

    def forward(self, stream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [P, G, n, D] of the heads here, of all streams, or of those with these numbers."""
        embedding = self.embedding if stream is None else self.embedding.index_select(0, stream)
        hidden = torch.tanh(self.hidden(embedding))
        heads = (linear(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.key, self.value))
        return next(heads), next(heads)


class StreamLinear(nn.Linear):
    """A linear layer over all streams, one after the other: [T, P, d] -> [T, out], without its bias, which is added where the result is
    used. Streams held elsewhere count as zero here; `merge_streams` adds them.
    """

    def __init__(self, width: int, streams: int, out: int):
        super().__init__(streams * width, out)
        self.width, self.first_stream = width, 0
        self.merge_streams: Exchange = identity

    def forward(self, x: Tensor) -> Tensor:
        here = self.weight.narrow(1, self.first_stream * self.width, x.shape[1] * self.width)
        return self.merge_streams(F.linear(x.flatten(1), here))


class Aggregator(nn.Module):
    """y = sum_p w_p X_p with w = softmax(mix(silu(hidden(X_1..X_P)))) (1 - eps) + eps / P.

    X is [T, P, d]; returns y [T, d] and w [T, P] (fp32). The hidden layer reads the streams one after the other (column p*d + j);
    the published checkpoints order them hidden-major (column j*P + p), which import and export permute.

    Where X has only some of the streams, `scatter_streams` adds their parts of y; each rank then goes on with its share of the tokens.
    `fused` is that of `megascale.kernels.aggregate`, which has the maths.
    """

    def __init__(self, width: int, streams: int, smoothing: float, hidden: int | None = None):
        super().__init__()
        self.hidden = StreamLinear(width, streams, hidden or width)
        self.mix = nn.Linear(hidden or width, streams)
        self.smoothing, self.streams = smoothing, streams
        self.scatter_streams: Exchange = identity
        self.share_streams: Exchange = identity
        self.fused: bool | None = None
        self.why_plain = why_plain(streams, width, hidden or width)
        """why a GPU has no kernels for it, in words; empty: it has"""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mix = self.hidden, (self.mix.weight, self.mix.bias, self.smoothing)
        if hidden.merge_streams is identity:
            return linear_aggregate_streams(x, hidden.weight, hidden.bias, *mix, fused=self.fused)
        y, weights = aggregate_streams(x, hidden(x), hidden.bias, *mix, first_stream=hidden.first_stream, fused=self.fused)
        return self.scatter_streams(y), self.share_streams(weights)

    @torch.no_grad()
    def similarity(self, x: Tensor) -> Tensor:
        """Mean cosine of the angles between the P streams of each token: x [T, P, d] -> fp32 [T].

        With unit vectors u_p it is (|sum_p u_p|^2 - P) / (P (P - 1)): no pair is formed, and one stream at a time is widened.
        """
        total = sum(F.normalize(one.float(), dim=-1) for one in x.unbind(1))
        assert isinstance(total, Tensor)
        return (self.scatter_streams(total).square().sum(-1) - self.streams) / (self.streams * (self.streams - 1))


def join_reports(reports: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The routers' reports of the streams, which went through the layers one after the other, as if they had gone together."""
    joined: dict[str, Tensor] = {}
    for name in reports[0]:
        parts = [report[name] for report in reports]
        kind = name.rpartition("/")[2]
        if kind == "load":
            joined[name] = torch.cat(parts)
        elif kind == "policy":
            joined[name] = torch.cat(parts, 1)
        else:  # losses, and sums with their weights
            joined[name] = torch.stack(parts).sum(0)
    return joined
