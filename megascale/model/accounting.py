"""Exact parameters and FLOPs of a model config. d width, D head width, P streams, K blocks, E experts, k per token, V vocabulary.

FLOPs count a multiply-add as 2 and a backward pass as twice the forward pass; element-wise work is not counted. `model` FLOPs take the keys
that a token really sees; `full` FLOPs take every key of the sequence, as Megatron-LM and PaLM (arXiv 2204.02311, appendix B) do.
"""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config.schema import Model
from megascale.config.size import end_width, strided_layers
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
    extras = head_dim * (heads + 2 * kv) * model.qkv_bias + 2 * head_dim * model.qk_norm
    experts, streams, ends = model.experts, model.streams, end_width(model)
    routed = sum(is_routed(layer, model) for layer in range(model.layers))
    dense = model.layers - routed
    expert, router = 3 * d * (experts.width or 0), _router_weights(model)
    several = streams.count > 1
    return Parameters(
        embedding=model.vocab_size * ends,
        head=0 if model.tie_embeddings else model.vocab_size * ends,
        attention=model.layers * (_projections(model) + extras),
        feed_forward=dense * 3 * d * model.ffn_width + routed * (experts.count + experts.shared) * expert,
        routers=routed * router,
        norms=2 * model.layers * d + ends,
        prefixes=model.layers * _prefixes(model) * several,
        aggregator=((streams.count * ends + 1) * d + (d + 1) * streams.count) * several,
        altup=_altup_parameters(model),
        matmul_per_token=sum(_matmul_weights(model, layer) for layer in range(model.layers)),
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


def _projections(model: Model) -> int:
    """Weights of q, k, v and o."""
    assert model.kv_heads and model.head_dim
    return model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads)


def _router_weights(model: Model) -> int:
    """Of one routed layer."""
    experts, d = model.experts, model.width
    router = 0 if experts.router == "hash" else experts.count * d
    return router + baseline_width(model) * (d + 1) * (experts.router == "rl_r")


def _matmul_weights(model: Model, layer: int) -> int:
    """Weights of a layer that one token of one stream is multiplied by."""
    assert model.ffn_width
    experts = model.experts
    if not is_routed(layer, model):
        return _projections(model) + 3 * model.width * model.ffn_width
    used = (experts.per_token + experts.shared) * 3 * model.width * (experts.width or 0)
    return _projections(model) + used + _router_weights(model)


def _altup_parameters(model: Model) -> int:
    blocks, token = model.altup.blocks, model.altup.coefficients == "token"
    if model.altup.form == "sequence":
        return 3 * len(strided_layers(model))
    coefficients = (blocks**2 + blocks) * (blocks if token else 1) + (blocks + 1) * model.width * token
    return model.layers * coefficients * (blocks > 1)


def active_parameters(model: Model) -> int:
    """The parameters that one token passes: all but those of the experts that it is not sent to."""
    routed = sum(is_routed(layer, model) for layer in range(model.layers))
    experts = model.experts
    return parameters(model).total - routed * (experts.count - experts.per_token) * 3 * model.width * (experts.width or 0)


def flops_per_token(model: Model, visible_keys: float, frozen_trunk: bool = False, kept: float | None = None) -> float:
    """FLOPs of a loss token, forward and backward.

    P (6 N_used + 12 L H D (a + n [P>1])) + 6 (P c d + d P) [P>1] + 6 P K^2 d L [K>1] + 6 c V, c the width of the head: d, or K d of the
    wide form. Token-dependent coefficients add 6 P (2 K d + K^3 + K^2) L. A layer of Sequence-AltUp counts for the share s of the tokens
    that it keeps, each of which sees s a + (1 - s) / 2 keys.

    Args:
        visible_keys: a, mean number of keys a token sees in its document, itself included (prefixes n are added here).
        frozen_trunk: the weights of layers and head are not trained: their own gradients, a third of 6 N_used and of 6 c V, are not
            computed.
        kept: s; none = 1/k.
    """
    return layer_flops_per_token(model, visible_keys, frozen_trunk, kept) + end_flops_per_token(model, frozen_trunk)


def end_flops_per_token(model: Model, frozen_trunk: bool = False) -> float:
    """The part of `flops_per_token` that is spent behind the layers: in the aggregator and the head."""
    assert model.vocab_size
    streams, several, ends = model.streams.count, model.streams.count > 1, end_width(model)
    aggregator = 6 * (streams * ends * model.width + model.width * streams) * several
    return aggregator + (4 if frozen_trunk else 6) * ends * model.vocab_size


def hardware_flops_per_token(
    model: Model, visible_keys: float, recompute: str, frozen_trunk: bool = False, kept: float | None = None
) -> float:
    """`flops_per_token` of what is really computed: layers once more where they are recomputed, and once what the streams share.

    `flops_per_token` counts every stream's layers in full, as the paper does. But the streams part in the first layer's attention: its
    projections run once, and so do its scores and values between tokens in the forward pass (their backward pass runs for each stream).
    With `recompute: stream` each stream runs by itself, and nothing is shared.

    Args:
        visible_keys, frozen_trunk, kept: as in `flops_per_token`.
        recompute: `parallel.recompute`.
    """
    assert model.kv_heads and model.head_dim
    streams = model.streams.count
    flops = flops_per_token(model, visible_keys, frozen_trunk, kept)
    if recompute == "stream" and streams > 1:
        return flops + layer_flops_per_token(model, visible_keys, kept=kept) / 3
    projections = 2 * model.width * model.head_dim * (model.heads + 2 * model.kv_heads)
    attention = 4 * model.heads * model.head_dim * visible_keys
    flops -= (streams - 1) * ((2 if frozen_trunk else 3) * projections + attention)
    if recompute == "layer":
        flops += layer_flops_per_token(model, visible_keys, kept=kept) / 3 - (streams - 1) * (projections + attention)
    return flops


def layer_flops_per_token(model: Model, visible_keys: float, frozen_trunk: bool = False, kept: float | None = None) -> float:
    """The part of `flops_per_token` that is spent in the layers; recomputing them costs a third of it once more."""
    return sum(flops_by_layer(model, visible_keys, frozen_trunk, kept))


def flops_by_layer(model: Model, visible_keys: float, frozen_trunk: bool = False, kept: float | None = None) -> list[float]:
    """`layer_flops_per_token` of each layer, first to last."""
    share, strided = 1 / model.altup.stride if kept is None else kept, strided_layers(model)
    # a document of n tokens has n s kept ones: (n s + 1) / 2 = s (n + 1) / 2 + (1 - s) / 2
    kept_keys = share * visible_keys + (1 - share) / 2
    return [
        share * _layer_flops(model, layer, kept_keys, frozen_trunk)
        if layer in strided
        else _layer_flops(model, layer, visible_keys, frozen_trunk)
        for layer in range(model.layers)
    ]


def _layer_flops(model: Model, layer: int, visible_keys: float, frozen_trunk: bool) -> float:
    """Of a token that the layer computes on."""
    assert model.head_dim
    streams, blocks, d = model.streams.count, model.altup.blocks, model.width
    keys = visible_keys + model.streams.prefix_tokens * (streams > 1)
    mixed = blocks**2 * d * (blocks > 1)
    if blocks > 1 and model.altup.coefficients == "token":
        mixed += 2 * blocks * d + blocks**3 + blocks**2
    weights = (4 if frozen_trunk else 6) * _matmul_weights(model, layer)
    return streams * (weights + 6 * mixed + 12 * model.heads * model.head_dim * keys)


def mean_visible_keys(positions_mean: float, model: Model) -> float:
    """a, from the mean position in the document (positions start at 0); an upper bound when a sliding window is shorter than documents."""
    keys = positions_mean + 1
    return keys if model.sliding_window is None else min(keys, float(model.sliding_window))
