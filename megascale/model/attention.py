"""Grouped-query attention of P streams, with ParScale prefixes. T tokens, P streams, H query heads, G key/value heads, D head width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.kernels.attention import attention, flash_forward, merge_by_lse
from megascale.model.exchange import Exchange, Split, identity
from megascale.model.layers import RMSNorm, rotary_table, rotate


@dataclass(frozen=True)
class Packing:
    """What attention knows of the packed tokens: rotary tables [T,1,D/2], document borders [documents + 1], the longest length."""

    cos: Tensor
    sin: Tensor
    borders: Tensor
    longest: int


def pack(positions: Tensor, documents: Tensor, model: Model) -> Packing:
    """The packing of a micro-batch from positions and document numbers, both [B, S]."""
    assert model.head_dim is not None
    table = rotary_table(positions.flatten(), model.head_dim, model.rotary)
    return Packing(*table, document_borders(documents), documents.shape[1])


def document_borders(documents: Tensor) -> Tensor:
    """Where documents start in the flattened tokens, and their number of tokens at the end; int32 [documents + 1]. Meta tensors, which
    have no values (dry runs), count as one document a sequence.
    """
    if documents.is_meta:
        return documents.new_empty(documents.shape[0] + 1, dtype=torch.int32)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([documents.numel()])]).to(torch.int32)


class KeyValueCache:
    """Keys and values of the tokens so far, one pair of [B, N, P*G, D] buffers a layer. Prefixes are not stored: they are parameters."""

    def __init__(self, model: Model, batch: int, tokens: int, like: Tensor):
        assert model.kv_heads is not None and model.head_dim is not None
        shape = (batch, tokens, model.streams.count * model.kv_heads, model.head_dim)
        self.pairs = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(model.layers)]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, m, P*G, D] behind the tokens so far and return all of them; `length` moves once all layers have stored."""
        stop = self.length + k.shape[1]
        for buffer, new in zip(self.pairs[layer], (k, v), strict=True):
            buffer[:, self.length : stop] = new
        return self.pairs[layer][0][:, :stop], self.pairs[layer][1][:, :stop]


class Attention(nn.Module):
    """Causal attention [T, P, d] -> [T, P, d]: q/k/v projections, optional q/k norm, rotary, prefixes, output projection.

    With P > 1 each stream has n learned keys and values per layer, used without rotary and after any k-norm (arXiv 2505.10475, section 3).
    """

    def __init__(self, model: Model):
        super().__init__()
        assert model.kv_heads is not None and model.head_dim is not None
        self.streams, self.head_dim, self.window = model.streams.count, model.head_dim, model.sliding_window
        heads, kv_heads = model.heads, model.kv_heads
        self.q = nn.Linear(model.width, heads * self.head_dim, bias=model.qkv_bias)
        self.k = nn.Linear(model.width, kv_heads * self.head_dim, bias=model.qkv_bias)
        self.v = nn.Linear(model.width, kv_heads * self.head_dim, bias=model.qkv_bias)
        self.o = nn.Linear(heads * self.head_dim, model.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, model.norm_eps) if model.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, model.norm_eps) if model.qk_norm else None
        self.prefix_k = self.prefix_v = None
        if self.streams > 1:
            shape = (self.streams, kv_heads, model.streams.prefix_tokens, self.head_dim)
            self.prefix_k, self.prefix_v = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        by_head, by_kv_head = Split(0, "tp", heads), Split(0, "tp", kv_heads)
        self.splits = {"q.weight": by_head, "q.bias": by_head, "o.weight": Split(1, "tp", heads)}
        self.splits |= {f"{name}.{kind}": by_kv_head for name in "kv" for kind in ("weight", "bias")}
        self.splits |= {f"prefix_{name}": Split(1, "tp", kv_heads) for name in "kv"}
        self.gather_tokens: Exchange = identity
        self.scatter_tokens: Exchange = identity

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [T, P*H, D], rotated k and v [T, P*G, D] of x [T, P, d]."""
        q, k, v = (linear(x).view(x.shape[0], -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        x = self.gather_tokens(x)
        q, k, v = self.project(x, packing.cos, packing.sin)
        out = attention(q, k, v, packing.borders, packing.longest, self.window, self.prefix_k, self.prefix_v)
        return self.scatter_tokens(self.o(out.view(*x.shape[:2], -1)))

    def decode(self, x: Tensor, packing: Packing, cache: KeyValueCache, layer: int) -> Tensor:
        """`forward` for the next m tokens of B texts, x [B*m, P, d], on top of the cached ones: m tokens at the start, one afterwards."""
        batch = cache.pairs[0][0].shape[0]
        q, k, v = (y.view(batch, -1, *y.shape[1:]) for y in self.project(x, packing.cos, packing.sin))
        assert cache.length == 0 or q.shape[1] == 1, "prefill at once, then one token at a time"
        k, v = cache.append(layer, k, v)
        prefill = cache.length == 0
        if self.window and not prefill:
            k, v = k[:, -self.window :], v[:, -self.window :]
        out, lse = flash_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), prefill, self.window or 0)
        if self.prefix_k is not None and self.prefix_v is not None:
            # streams become the batch of the prefix part: [P, H, B*m, D] against [P, G, n, D]
            def streams_first(y: Tensor) -> Tensor:
                return y.unflatten(1, (self.streams, -1)).movedim(0, 2).flatten(2, 3)

            prefix_out, prefix_lse = flash_forward(streams_first(q.transpose(1, 2)), self.prefix_k, self.prefix_v, False)
            merged, _ = merge_by_lse(streams_first(out), streams_first(lse), prefix_out, prefix_lse)
            return self.o(merged.permute(2, 0, 1, 3).reshape(*x.shape[:2], -1))
        return self.o(out.transpose(1, 2).reshape(*x.shape[:2], -1))
