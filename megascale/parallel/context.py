"""Context parallelism: the tokens of a micro-batch are shared by ranks, which exchange in attention alone.

T tokens of a micro-batch, R context-parallel ranks, P streams (or 1, where they do not differ yet), H query heads, G key/value heads,
D head width.

all_gather  Every rank gathers the keys and values of all tokens (as Llama 3 was trained, arXiv 2407.21783, section 3.3.2). T is cut into
            2R chunks and rank r has chunks r and 2R-1-r, so that all have the same share of the causal triangle (zig-zag). What a token
            sees in its own chunk is computed from the keys here; what it sees before it is one rectangle a chunk, merged by log-sum-exp.
ulysses     Two all-to-alls: to all tokens of some heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509). Rank r has the r-th part of T.

Prefixes are merged where the queries are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megascale.kernels.attention import attention
from megascale.model.attention import Attention, Packing, Prefixes, first_tokens
from megascale.model.decoder import Decoder
from megascale.parallel.collectives import gather, gather_rows, share, swap_rows
from megascale.parallel.mesh import Mesh


@dataclass(frozen=True)
class _Peers:
    """The context-parallel ranks."""

    rank: int
    ranks: int
    group: str


class ZigZag:
    """Shares of tokens, document borders and attention of the mode all_gather."""

    def __init__(self, peers: _Peers):
        self.peers, self.chunks = peers, (peers.rank, 2 * peers.ranks - 1 - peers.rank)

    def share(self, x: Tensor) -> Tensor:
        """Of all tokens [T, ...] those here, [T/R, ...]."""
        by_chunk = x.unflatten(0, (2 * self.peers.ranks, -1))
        return torch.cat([by_chunk[chunk] for chunk in self.chunks])

    def join(self, x: Tensor) -> Tensor:
        """Of the tokens here [T/R, ...] all of them, in their order. Backward: the sums of what the ranks do with them."""
        (everything,) = self._gathered(x[None])
        return everything

    def _gathered(self, tensors: Tensor) -> list[Tensor]:
        """`join` of several tensors [n, T/R, ...] in one exchange; each is written once, into its order."""
        ranks, count = self.peers.ranks, tensors.shape[0]
        # unbound at once: the backward of single choices would fill a zero tensor of the whole for each
        chunks = gather_rows(tensors, ranks, self.peers.group).unflatten(1, (2, -1)).flatten(0, 1).unbind(0)
        places = [(rank, 0) for rank in range(ranks)] + [(rank, 1) for rank in reversed(range(ranks))]
        return [torch.cat([chunks[(rank * count + number) * 2 + half] for rank, half in places]) for number in range(count)]

    def borders(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Of documents [B, S]: where they, or a chunk, start among the tokens here; and for each of the two chunks the tokens here whose
        document started before it, and where this document's keys stand among all (see `megascale.kernels.attention`; int64 [2, 4]). Both
        are on the host.
        """
        width = documents.numel() // (2 * self.peers.ranks)
        if documents.is_meta:  # as if documents filled their sequences
            starts = torch.arange(documents.shape[0] + 1) * documents.shape[1]
        else:
            starts = first_tokens(documents.cpu()).long()
        spans, local = torch.zeros(2, 4, dtype=torch.int64), []
        for number, chunk in enumerate(self.chunks):
            first, here = chunk * width, number * width
            before = int(starts[starts <= first][-1])
            inside = starts[(starts > first) & (starts < first + width)]
            after = int(inside[0]) if len(inside) else first + width
            local += [torch.tensor([here]), inside - first + here]
            if before < first:
                spans[number] = torch.tensor([here, here + after - first, before, first])
        borders = torch.cat([*local, torch.tensor([2 * width])]).to(torch.int32)
        return borders, spans

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, prefixes: Prefixes, fused: bool | None
    ) -> Tensor:
        """See `attend_here`."""
        assert packing.spans is not None
        keys, values = self._gathered(torch.stack([k, v]))
        context = (keys, values, packing.spans)
        return attention(q, k, v, packing.borders, packing.longest, window, *prefixes, context, fused)


class Ulysses:
    """Shares of tokens and attention of the mode ulysses."""

    def __init__(self, peers: _Peers):
        self.peers = peers

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, prefixes: Prefixes, fused: bool | None
    ) -> Tensor:
        """See `attend_here`."""
        ranks, rank, group = self.peers.ranks, self.peers.rank, self.peers.group
        streams, groups = (1, k.shape[1]) if prefixes[0] is None else prefixes[0].shape[:2]
        here = k.shape[1] // groups
        # [T/R, P*H, D] -> [R, T/R, P, H/R, D]; q, k and v in one exchange
        parts = [x.unflatten(1, (here, ranks, -1)).movedim(2, 0) for x in (q, k, v)]
        heads = [part.shape[3] for part in parts]
        swapped = swap_rows(torch.cat(parts, 3), group).flatten(0, 1)
        q, k, v = (part.flatten(1, 2) for part in swapped.split(heads, 2))
        prefix_k, prefix_v = (None if x is None else x.unflatten(1, (ranks, -1))[:, rank] for x in prefixes)
        out = attention(q, k, v, packing.borders, packing.longest, window, prefix_k, prefix_v, fused=fused)
        back = swap_rows(out.unflatten(1, (streams, -1)).unflatten(0, (ranks, -1)), group)
        return back.permute(1, 2, 0, 3, 4).flatten(1, 3).contiguous()  # with one head a rank flattening alone does not copy


def share_context(module: nn.Module, mode: str, mesh: Mesh) -> None:
    """Connect a module for context parallelism, in place; `mode` is `parallel.context`."""
    ranks = mesh.along("cp")
    group = mesh.group(ranks)
    peers = _Peers(ranks.index(mesh.world.rank), len(ranks), group.group_name)
    if mode == "all_gather":
        zigzag = ZigZag(peers)
        if isinstance(module, Decoder):
            module.share_context, module.join_context, module.document_borders = zigzag.share, zigzag.join, zigzag.borders
        elif isinstance(module, Attention):
            module.attend = zigzag.attend
    elif isinstance(module, Decoder):
        module.share_context, module.join_context = share(group), gather(group)
    elif isinstance(module, Attention):
        module.attend = Ulysses(peers).attend
