"""What makes ParScale's streams differ and what joins them again (arXiv 2505.10475). T tokens, P streams, d width, n prefix slots,
G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
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
        """Keys and values [P, G, n, D] of the heads here, of all streams, or [1, G, n, D] of the one with this number [1]."""
        embedding = self.embedding if stream is None else self.embedding.index_select(0, stream)
        hidden = torch.tanh(self.hidden(embedding))
        heads = (linear(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.key, self.value))
        return next(heads), next(heads)


class Aggregator(nn.Module):
    """y = sum_p w_p X_p with w = softmax(mix(silu(hidden(X_1..X_P)))) (1 - eps) + eps / P.

    X is [T, P, d]; returns y [T, d] and w [T, P] (fp32). The hidden layer reads the streams one after the other (column p*d + j);
    the published checkpoints order them hidden-major (column j*P + p), which import and export permute.
    """

    def __init__(self, width: int, streams: int, smoothing: float, hidden: int | None = None):
        super().__init__()
        self.hidden = nn.Linear(streams * width, hidden or width)
        self.mix = nn.Linear(hidden or width, streams)
        self.smoothing = smoothing
        self.merge_streams: Exchange = identity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.mix(F.silu(self.merge_streams(self.hidden(x.flatten(1)))))
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = scores.to(wide).softmax(-1) * (1 - self.smoothing) + self.smoothing / x.shape[1]
        return (weights[..., None] * x).sum(1).to(x.dtype), weights


@torch.no_grad()
def similarity(x: Tensor) -> Tensor:
    """Mean cosine of the angles between the P streams of each token: x [T, P, d] -> fp32 [T].

    With unit vectors u_p it is (|sum_p u_p|^2 - P) / (P (P - 1)): no pair is formed, and one stream at a time is widened.
    """
    streams = x.shape[1]
    total = sum(F.normalize(one.float(), dim=-1) for one in x.unbind(1))
    assert isinstance(total, Tensor)
    return (total.square().sum(-1) - streams) / (streams * (streams - 1))


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
        elif kind == "residual":  # of the worst stream
            joined[name] = torch.stack(parts).amax(0)
        else:  # losses, and sums with their weights
            joined[name] = torch.stack(parts).sum(0)
    return joined
