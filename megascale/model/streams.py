"""ParScale's aggregator: P streams into one, before the head (arXiv 2505.10475, Eq. 6-7). T tokens, P streams, d width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.model.exchange import Exchange, identity


class Aggregator(nn.Module):
    """y = sum_p w_p X_p with w = softmax(mix(silu(hidden(X_1..X_P)))) (1 - eps) + eps / P.

    X is [T, P, d]; returns y [T, d] and w [T, P] (fp32). The hidden layer reads the streams one after the other (column p*d + j);
    the published checkpoints order them hidden-major (column j*P + p), which import and export permute.
    """

    def __init__(self, width: int, streams: int, smoothing: float):
        super().__init__()
        self.hidden = nn.Linear(streams * width, width)
        self.mix = nn.Linear(width, streams)
        self.smoothing = smoothing
        self.merge_streams: Exchange = identity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.mix(F.silu(self.merge_streams(self.hidden(x.flatten(1)))))
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = scores.to(wide).softmax(-1) * (1 - self.smoothing) + self.smoothing / x.shape[1]
        return (weights[..., None] * x).sum(1).to(x.dtype), weights
