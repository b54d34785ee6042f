"""The plain parts of a decoder layer: RMSNorm, rotary embedding, SwiGLU. T tokens, P streams, d width, D head width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Rotary
from megascale.model.exchange import Exchange, Split, identity


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32, returned in x's dtype (arXiv 1910.07467). The weight stays fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., d] -> [..., d] (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.splits = {
            "gate.weight": Split(0, "tp", hidden),
            "up.weight": Split(0, "tp", hidden),
            "down.weight": Split(1, "tp", hidden),
        }
        self.gather_tokens: Exchange = identity
        self.scatter_tokens: Exchange = identity

    def forward(self, x: Tensor) -> Tensor:
        x = self.gather_tokens(x)
        return self.scatter_tokens(self.down(F.silu(self.gate(x)) * self.up(x)))


def rotary_frequencies(head_dim: int, rotary: Rotary) -> tuple[Tensor, float]:
    """Angular frequencies [D/2] (fp64, radians per token) and the factor on cos and sin.

    llama3: frequencies whose wave is long against `original_context` are divided by `factor`, with a linear passage (Llama 3.1 report,
    section 3.4). yarn: the passage is linear in the dimension, cos and sin are scaled by 0.1 ln(factor) + 1 (arXiv 2309.00071, 3.2-3.4).
    """
    frequencies = rotary.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rotary.scaling == "none":
        return frequencies, 1.0
    if rotary.scaling == "llama3":
        turns = rotary.original_context * frequencies / (2 * math.pi)
        low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rotary.factor), 1.0

    def dimension(turns: float) -> float:
        return head_dim * math.log(rotary.original_context / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    first = max(math.floor(dimension(rotary.beta_fast)), 0)
    last = min(math.ceil(dimension(rotary.beta_slow)), head_dim - 1)
    passage = (torch.arange(head_dim // 2, dtype=torch.float64) - first) / max(last - first, 0.001)
    keep = 1 - passage.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rotary.factor), 0.1 * math.log(rotary.factor) + 1.0 if rotary.factor > 1 else 1.0


def rotary_table(positions: Tensor, head_dim: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D/2] in fp32 of integer positions [T]."""
    frequencies, scale = rotary_frequencies(head_dim, rotary)
    angles = positions.double()[:, None, None] * frequencies.to(positions.device)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [T, heads, D] by the table's angles; the Hugging Face pairing."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
