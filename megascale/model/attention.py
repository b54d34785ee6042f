"""Grouped-query attention of P streams, with ParScale prefixes. T tokens, P streams, H query heads, G key/value heads, D head width."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.size import strided_layers
from megascale.kernels.attention import attention
from megascale.kernels.flash import flash_forward
from megascale.kernels.merge import merge_by_lse
from megascale.kernels.transfer import send
from megascale.model.exchange import Exchange, Split, identity
from megascale.model.layers import RMSNorm, rotary_table, rotate
from megascale.model.streams import PrefixNetwork


@dataclass(frozen=True)
class Packing:
    """What attention knows of the packed tokens: rotary tables [T,1,D/2], document borders [documents + 1], the longest length."""

    cos: Tensor
    sin: Tensor
    borders: Tensor
    longest: int
    spans: Tensor | None = None
    """tokens here that see keys of other context-parallel ranks (see `megascale.kernels.attention`); none where all keys are here"""
    kept: Kept | None = None
    """none but with Sequence-AltUp"""


@dataclass(frozen=True)
class Kept:
    """Every k-th token of each document, T' of T; numbers of tokens and of kept tokens are int64."""

    tokens: Tensor
    """[T'], which are kept"""
    place: Tensor
    """[T, 1], where a token stands among the kept ones; T' for one that is not kept"""
    group: Tensor
    """[T], the kept token that a token follows: the last one up to it"""
    members: Tensor
    """[T', k], the tokens that follow a kept one, itself first; T where there are fewer than k"""
    packing: Packing
    """of the kept tokens by themselves"""


Borders = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Document numbers [B, S] -> `Packing.borders` and `Packing.spans`."""


def document_borders(documents: Tensor) -> tuple[Tensor, None]:
    """Where all tokens are here: see `first_tokens`."""
    return first_tokens(documents), None


def pack(
    positions: Tensor, documents: Tensor, model: Model, share: Exchange = identity, borders: Borders = document_borders
) -> Packing:
    """The packing of a micro-batch from positions and document numbers, both [B, S]; `share` and `borders` are of the tokens here. With
    documents on the host nothing waits for the device of the positions.
    """
    assert model.head_dim is not None
    table = rotary_table(share(positions.flatten()), model.head_dim, model.rotary)
    here, spans = borders(documents)
    packing = Packing(*table, send(here, positions.device), documents.shape[1], spans)
    if model.altup.form != "sequence":
        return packing
    return replace(packing, kept=keep(positions, packing, model.altup.stride, here))


def keep(positions: Tensor, packing: Packing, stride: int, starts: Tensor) -> Kept:
    """The tokens at multiples of the stride in their documents, of positions [B, S]; `starts` are the packing's borders, on the host if
    nothing is to wait for a device. Meta tensors, which have no values (dry runs), count as one document a sequence.
    """
    flat, longest = positions.flatten(), -(-positions.shape[1] // stride)
    here = flat % stride == 0
    if flat.is_meta:
        tokens, borders = flat.new_empty(positions.shape[0] * longest), packing.borders
    else:
        place = flat if starts.device == flat.device else places(starts)
        known = place % stride == 0
        counts = torch.cat([known.new_zeros(1), known]).cumsum(0)[starts.long()]
        tokens, borders = send(known.nonzero().flatten(), flat.device), send(counts.to(torch.int32), flat.device)
    group = here.cumsum(0) - 1
    place = torch.where(here, group, tokens.numel())[:, None]
    follows = tokens[:, None] + torch.arange(stride, device=flat.device)
    ends = torch.cat([tokens, tokens.new_full((1,), flat.numel())])[1:, None]
    members = torch.where(follows < ends, follows, flat.numel())
    return Kept(tokens, place, group, members, Packing(packing.cos[tokens], packing.sin[tokens], borders, longest))


def places(starts: Tensor) -> Tensor:
    """Of each token the place in its document, int64 [T], from `first_tokens`."""
    lengths = starts.long().diff()
    return torch.arange(int(starts[-1]), device=starts.device) - starts[:-1].long().repeat_interleave(lengths)


def first_tokens(documents: Tensor) -> Tensor:
    """Where documents start in the flattened tokens, and their number of tokens at the end; int32 [documents + 1]. Meta tensors, which
    have no values (dry runs), count as one document a sequence.
    """
    if documents.is_meta:
        return documents.new_empty(documents.shape[0] + 1, dtype=torch.int32)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([documents.numel()])]).to(torch.int32)


Prefixes = tuple[Tensor | None, Tensor | None]
"""Keys and values [P, G, n, D]; none with P = 1."""


def attend_here(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, prefixes: Prefixes, fused: bool | None
) -> Tensor:
    """Attention whose keys are all on this device; arguments and result as of `megascale.kernels.attention.attention`."""
    return attention(q, k, v, packing.borders, packing.longest, window, *prefixes, fused=fused)


class KeyValueCache:
    """Keys and values of the tokens so far, one pair of [B, N, P*G, D] buffers a layer; [B, N, G, D] in the first one, where all
    streams share them. Prefixes are not stored: they are parameters.

    A layer of Sequence-AltUp stores those of every k-th token.

    Args:
        model: the whole one.
        batch: B.
        tokens: N, the most that it can hold.
        like: a tensor of the dtype and on the device of the keys.
        layers: the numbers of those here; none: all.
        kv_heads: G, of those here; none: all.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        tokens: int,
        like: Tensor,
        layers: Iterable[int] | None = None,
        kv_heads: int | None = None,
    ):
        assert model.kv_heads is not None and model.head_dim is not None
        strided, self.batch = strided_layers(model), batch
        kv_heads = model.kv_heads if kv_heads is None else kv_heads
        layers = range(model.layers) if layers is None else list(layers)
        self.strides = {layer: model.altup.stride if layer in strided else 1 for layer in layers}
        heads = {layer: kv_heads if layer == 0 else model.streams.count * kv_heads for layer in layers}
        shapes = {layer: (batch, -(-tokens // self.strides[layer]), heads[layer], model.head_dim) for layer in layers}
        self.pairs = {layer: (like.new_zeros(shape), like.new_zeros(shape)) for layer, shape in shapes.items()}
        self.shifts: dict[int, Tensor] = {}
        """layer -> [B, P, d], what the tokens up to the next stored one get from the last (Sequence-AltUp)"""
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, m, P*G, D] (see above) behind the tokens so far and return all of them; `length` moves once all layers have stored."""
        start = -(-self.length // self.strides[layer])
        stop = start + k.shape[1]
        for buffer, new in zip(self.pairs[layer], (k, v), strict=True):
            buffer[:, start:stop] = new
        return self.pairs[layer][0][:, :stop], self.pairs[layer][1][:, :stop]


class Attention(nn.Module):
    """Causal attention [T, P, d] -> [T, P, d]: q/k/v projections, optional q/k norm, rotary, prefixes, output projection.

    With P > 1 each stream has n learned keys and values per layer, used without rotary and after any k-norm (arXiv 2505.10475, section 3).
    Streams that do not differ yet come as one, [T, 1, d] -> [T, P, d]: what their prefixes do not change is computed once.
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
        self.prefix_k = self.prefix_v = self.prefix_network = None
        if self.streams > 1 and model.streams.reparameterise is not None:
            self.prefix_network = PrefixNetwork(model)
        elif self.streams > 1:
            shape = (self.streams, kv_heads, model.streams.prefix_tokens, self.head_dim)
            self.prefix_k, self.prefix_v = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        by_head, by_kv_head = Split(0, "tp", heads), Split(0, "tp", kv_heads)
        self.splits = {"q.weight": by_head, "q.bias": by_head, "o.weight": Split(1, "tp", heads)}
        self.splits |= {f"{name}.{kind}": by_kv_head for name in "kv" for kind in ("weight", "bias")}
        if self.prefix_k is not None:
            self.splits |= {f"prefix_{name}": Split(1, "tp", kv_heads) for name in "kv"}
        self.gather_tokens: Exchange = identity
        self.scatter_tokens: Exchange = identity
        self.attend = attend_here
        self.fused: bool | None = None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [T, P*H, D], rotated k and v [T, P*G, D] of x [T, P, d]."""
        q, k, v = (linear(x).view(x.shape[0], -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def prefixes(self, stream: Tensor | None = None) -> Prefixes:
        """Keys and values [P, G, n, D] of all streams, or of those with these numbers; none with P = 1."""
        if self.prefix_network is not None:
            return self.prefix_network(stream)
        if self.prefix_k is None or self.prefix_v is None:
            return None, None
        if stream is None:
            return self.prefix_k, self.prefix_v
        return self.prefix_k.index_select(0, stream), self.prefix_v.index_select(0, stream)

    def forward(self, x: Tensor, packing: Packing, stream: Tensor | None = None) -> Tensor:
        """`stream` has the numbers of the streams in x [T, P, d] (or [T, 1, d]: they do not differ yet); none: x has all of them."""
        x = self.gather_tokens(x)
        q, k, v = self.project(x, packing.cos, packing.sin)
        prefixes = self.prefixes(stream)
        out = self.attend(q, k, v, packing, self.window, prefixes, self.fused)
        streams = 1 if prefixes[0] is None else prefixes[0].shape[0]
        return self.scatter_tokens(self.o(out.view(x.shape[0], streams, -1)))

    def decode(self, x: Tensor, packing: Packing, cache: KeyValueCache, layer: int) -> Tensor:
        """`forward` for the next m tokens of B texts, x [B*m, P or 1, d], on top of the cached ones: m tokens at first, then one."""
        x = self.gather_tokens(x)
        q, k, v = (y.view(cache.batch, -1, *y.shape[1:]) for y in self.project(x, packing.cos, packing.sin))
        assert cache.length == 0 or q.shape[1] == 1, "prefill at once, then one token at a time"
        k, v = cache.append(layer, k, v)
        prefill = cache.length == 0
        if self.window and not prefill:
            k, v = k[:, -self.window :], v[:, -self.window :]
        out, lse = flash_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), prefill, self.window or 0)
        prefix_k, prefix_v = self.prefixes()
        if prefix_k is not None and prefix_v is not None:
            # streams become the batch of the prefix part: [P, H, B*m, D] against [P, G, n, D]
            def streams_first(y: Tensor) -> Tensor:
                return y.unflatten(1, (x.shape[1], -1)).movedim(0, 2).flatten(2, 3)

            queries = streams_first(q.transpose(1, 2)).expand(self.streams, -1, -1, -1)
            prefix_out, prefix_lse = flash_forward(queries, prefix_k, prefix_v, False)
            merged, _ = merge_by_lse(streams_first(out), streams_first(lse), prefix_out, prefix_lse)
            return self.scatter_tokens(self.o(merged.permute(2, 0, 1, 3).reshape(x.shape[0], self.streams, -1)))
        return self.scatter_tokens(self.o(out.transpose(1, 2).reshape(*x.shape[:2], -1)))
