"""Exact parameters and FLOPs of a model config. d width, D head width, P streams, K blocks, E experts, k per token, V vocabulary.

FLOPs count a multiply-add as 2 and a backward pass as twice the forward pass; element-wise work is not counted. `model` FLOPs take the keys
that a token really sees; `full` FLOPs take every key of the sequence, as Megatron-LM and PaLM (arXiv 2204.02311, appendix B) do.
"""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config.schema import Model
from megascale.model.decoder import is_routed
from megascale.model.routers import baseline_width


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, all exact."""

    embedding: int
    head: int
    """0 when tied"""
    attention: int
    """projections, biases, q/k norms"""
    feed_forward: int
    """dense, shared and routed experts"""
    routers: int
    norms: int
    prefixes: int
    aggregator: int
    altup: int
    matmul_per_token: int
    """N_used: weights that one token of one stream is multiplied by in the layers (attention, k + shared experts, router)"""

    @property
    def total(self) -> int:
        """Everything that is trained."""
        parts = (self.embedding, self.head, self.attention, self.feed_forward, self.routers, self.norms)
        return sum(parts) + self.prefixes + self.aggregator + self.altup

    @property
    def non_embedding(self) -> int:
        """N of the scaling laws: everything but the embedding and the head."""
        return self.total - self.embedding - self.head


def parameters(model: Model) -> Parameters:
    """The parameters of a resolved config."""
    assert model.vocab_size and model.kv_heads and model.head_dim and model.ffn_width
    d, heads, kv, head_dim = model.width, model.heads, model.kv_heads, model.head_dim
    projections = d * head_dim * (2 * heads + 2 * kv)
    extras = head_dim * (heads + 2 * kv) * model.qkv_bias + 2 * head_dim * model.qk_norm
    experts, streams, blocks = model.experts, model.streams, model.altup.blocks
    routed = sum(is_routed(layer, model) for layer in range(model.layers))
    dense = model.layers - routed
    expert = 3 * d * (experts.width or 0)  # none without experts
    router = 0 if experts.router == "hash" else experts.count * d
    router += baseline_width(model) * (d + 1) * (experts.router == "rl_r")
    several = streams.count > 1
    return Parameters(
        embedding=model.vocab_size * d,
        head=0 if model.tie_embeddings else model.vocab_size * d,
        attention=model.layers * (projections + extras),
        feed_forward=dense * 3 * d * model.ffn_width + routed * (experts.count + experts.shared) * expert,
        routers=routed * router,
        norms=(2 * model.layers + 1) * d,
        prefixes=model.layers * _prefixes(model) * several,
        aggregator=((streams.count * d + 1) * d + (d + 1) * streams.count) * several,
        altup=model.layers * (blocks * blocks + blocks) * (blocks > 1),
        matmul_per_token=model.layers * projections
        + dense * 3 * d * model.ffn_width
        + routed * ((experts.per_token + experts.shared) * expert + router),
    )


def _prefixes(model: Model) -> int:
    """Parameters of one layer's prefixes, or of the network that makes them."""
    assert model.kv_heads and model.head_dim
    rows, kv_width, hidden = (
        model.streams.count * model.streams.prefix_tokens,
        model.kv_heads * model.head_dim,
        model.streams.reparameterise,
    )
    return 2 * rows * kv_width if hidden is None else (rows + hidden + 1) * hidden + 2 * (hidden + 1) * kv_width


def active_parameters(model: Model) -> int:
    """The parameters that one token passes: all but those of the experts that it is not sent to."""
    routed = sum(is_routed(layer, model) for layer in range(model.layers))
    experts = model.experts
    return parameters(model).total - routed * (experts.count - experts.per_token) * 3 * model.width * (experts.width or 0)


def flops_per_token(model: Model, visible_keys: float, frozen_trunk: bool = False) -> float:
    """FLOPs of a loss token, forward and backward.

    P (6 N_used + 12 L H D (a + n [P>1])) + 6 (P d^2 + d P) [P>1] + 6 P K^2 d L [K>1] + 6 d V.

    Args:
        visible_keys: a, mean number of keys a token sees in its document, itself included (prefixes n are added here).
        frozen_trunk: the weights of layers and head are not trained: their own gradients, a third of 6 N_used and of 6 d V, are not
            computed.
    """
    assert model.vocab_size and model.head_dim
    streams, several = model.streams.count, model.streams.count > 1
    aggregator = 6 * (streams * model.width**2 + model.width * streams) * several
    each = 4 if frozen_trunk else 6
    return layer_flops_per_token(model, visible_keys, frozen_trunk) + aggregator + each * model.width * model.vocab_size


def hardware_flops_per_token(model: Model, visible_keys: float, recompute: str, frozen_trunk: bool = False) -> float:
    """`flops_per_token` of what is really computed: layers once more where they are recomputed, and once what the streams share.

    `flops_per_token` counts every stream's layers in full, as the paper does. But the streams part in the first layer's attention: its
    projections run once, and so do its scores and values between tokens in the forward pass (their backward pass runs for each stream).
    With `recompute: stream` each stream runs by itself, and nothing is shared.

    Args:
        visible_keys, frozen_trunk: as in `flops_per_token`.
        recompute: `parallel.recompute`.
    """
    assert model.kv_heads and model.head_dim
    streams = model.streams.count
    flops = flops_per_token(model, visible_keys, frozen_trunk)
    if recompute == "stream" and streams > 1:
        return flops + layer_flops_per_token(model, visible_keys) / 3
    projections = 2 * model.width * model.head_dim * (model.heads + 2 * model.kv_heads)
    attention = 4 * model.heads * model.head_dim * visible_keys
    flops -= (streams - 1) * ((2 if frozen_trunk else 3) * projections + attention)
    if recompute == "layer":
        flops += layer_flops_per_token(model, visible_keys) / 3 - (streams - 1) * (projections + attention)
    return flops


def layer_flops_per_token(model: Model, visible_keys: float, frozen_trunk: bool = False) -> float:
    """The part of `flops_per_token` that is spent in the layers; recomputing them costs a third of it once more."""
    assert model.head_dim
    streams, blocks = model.streams.count, model.altup.blocks
    keys = visible_keys + model.streams.prefix_tokens * (streams > 1)
    each = 4 if frozen_trunk else 6
    trunk = each * parameters(model).matmul_per_token + 12 * model.layers * model.heads * model.head_dim * keys
    return streams * trunk + 6 * streams * blocks**2 * model.width * model.layers * (blocks > 1)


def mean_visible_keys(positions_mean: float, model: Model) -> float:
    """a, from the mean position in the document (positions start at 0); an upper bound when a sliding window is shorter than documents."""
    keys = positions_mean + 1
    return keys if model.sliding_window is None else min(keys, float(model.sliding_window))
