"""AltUp for modeling_megascale.py: K residual blocks, or one block whose middle layers keep every k-th token (arXiv 2301.13310).

B texts, S new tokens, N tokens so far with the new ones, P streams, K blocks, d width, D head width. Blocks are [B, S, P, d].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache


def computed_block(m: dict[str, Any], layer: int) -> int:
    """The block that a layer computes on."""
    if m["altup"]["select"] == "same":
        return 0
    return (layer // m["experts"]["every"] if m["altup"]["select"] == "by_period" else layer) % m["altup"]["blocks"]


def weighted(coefficients: Tensor, blocks: list[Tensor]) -> Tensor:
    """sum_k c_k x_k in fp32, of coefficients [K] or [B, S, P, K]."""
    return sum((coefficients[..., k, None] * block.float() for k, block in enumerate(blocks)), torch.zeros(()))


class AltUp(nn.Module):
    """Prediction and correction of K blocks by coefficients less the identity: learned ones, or computed from each token (Gemma 3n)."""

    def __init__(self, m: dict[str, Any], layer: int):
        super().__init__()
        blocks, self.by_token, self.eps = m["altup"]["blocks"], m["altup"]["coefficients"] == "token", m["norm_eps"]
        self.computed, self.reads_predicted = computed_block(m, layer), m["altup"]["read"] == "predicted"
        self.predict = nn.Parameter(torch.zeros(blocks**2 if self.by_token else blocks, blocks))
        self.correct = nn.Parameter(torch.zeros(blocks, blocks) if self.by_token else torch.zeros(blocks))
        if self.by_token:
            self.modality = nn.Parameter(torch.zeros(blocks, m["width"]))
            self.modality_norm = nn.Parameter(torch.ones(m["width"]))

    def modalities(self, u: Tensor) -> Tensor:
        """tanh(W RMSNorm(u) / d), [B, S, P, K] in fp32."""
        wide = u.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) / u.shape[-1]
        return (F.linear(wide, self.modality.float() * self.modality_norm.float()) * scale).tanh()

    def prediction(self, blocks: list[Tensor]) -> Tensor:
        """Coefficients [K, K] or [B, S, P, K, K], fp32."""
        if not self.by_token:
            return self.predict.float()
        return F.linear(self.modalities(blocks[self.computed]), self.predict.float()).unflatten(-1, (len(blocks), -1))

    def read(self, blocks: list[Tensor], prediction: Tensor) -> Tensor:
        """The block that the layer computes on."""
        x = blocks[self.computed]
        return (x + weighted(prediction[..., self.computed, :], blocks)).to(x.dtype) if self.reads_predicted else x

    def write(self, blocks: list[Tensor], prediction: Tensor, update: Tensor) -> list[Tensor]:
        """The next blocks from the layer's update, attention + feed-forward."""
        other = weighted(prediction[..., self.computed, :], blocks)
        correction = self.correct.float()
        if self.by_token:
            correction = F.linear(self.modalities(self.read(blocks, prediction).float() + update), correction)
        delta = update.float() if self.reads_predicted else update.float() - other
        return [
            (block + weighted(prediction[..., i, :], blocks) + (1 + correction[..., i, None]) * delta).to(block.dtype)
            for i, block in enumerate(blocks)
        ]


class Groups:
    """Which of the tokens so far a strided layer keeps: those at multiples of the stride in their texts, by a mask [B, N] of the tokens
    that are no padding.
    """

    def __init__(self, mask: Tensor, stride: int, new: int):
        mask = mask.bool()
        self.kept = mask & ((mask.long().cumsum(-1) - 1) % stride == 0)
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        self.last = torch.where(self.kept, places, 0).cummax(-1).values[:, -new:]
        """[B, S], the last kept token up to each new one"""

    def visible(self, visible: Tensor) -> Tensor:
        """[B, 1, S, N] for a strided layer: kept tokens alone, and each token itself, because a softmax needs one key."""
        new, all_tokens = visible.shape[-2:]
        itself = torch.arange(all_tokens - new, all_tokens, device=visible.device)[:, None] == torch.arange(
            all_tokens, device=visible.device
        )
        return visible & self.kept[:, None, None] | itself


class SequenceAltUp(nn.Module):
    """A strided layer: every token gets what the last kept one was moved by. Here the layer itself runs on all tokens, and what it makes
    of those that are not kept is left unused, because texts of a batch may be padded differently.
    """

    def __init__(self, m: dict[str, Any], layer: int):
        super().__init__()
        self.layer, self.head_dim, self.width = layer, m["head_dim"], m["width"]
        self.heads_per_stream = -(-m["width"] // m["head_dim"])
        self.predict, self.correct = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))

    def room(self, streams: int) -> int:
        """Heads of the cached values in which the layer's shifts lie."""
        return streams * self.heads_per_stream

    def forward(self, x: Tensor, update: Tensor, groups: Groups, cache: Any) -> Tensor:
        """The next block [B, S, P, d]."""
        (more, other), read = self.predict.float(), x.float()
        shift = (other * read + (1 + self.correct.float()) * (update.float() - (more + other) * read)).to(x.dtype)
        shifts = shift if cache is None else self.remembered(shift, cache)
        spread = shifts.gather(1, groups.last[:, :, None, None].expand_as(shift))
        return (read + more * read + spread.float()).to(x.dtype)

    def remembered(self, shift: Tensor, cache: Any) -> Tensor:
        """The shifts of all tokens so far [B, N, P, d]; those of the new ones are put behind the cached values of the layer."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"Sequence-AltUp needs a DynamicCache, not {type(cache).__name__}")
        layer: Any = cache.layers[self.layer]
        streams, new, values = shift.shape[2], shift.shape[1], layer.values
        folded = F.pad(shift, (0, self.heads_per_stream * self.head_dim - self.width)).unflatten(-1, (-1, self.head_dim))
        room, folded = self.room(streams), folded.flatten(2, 3).transpose(1, 2)
        shifts = torch.cat([values[:, -room:, :-new], folded.to(values.dtype)], 2)
        layer.values = torch.cat([values[:, :-room], shifts], 1)
        return shifts.transpose(1, 2).unflatten(2, (streams, -1)).flatten(3)[..., : self.width].to(shift.dtype)
