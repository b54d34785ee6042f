"""The decoder: embedding, layers over the state [T, P, K, d], aggregation of the streams, head. Plain single-device PyTorch.

B texts of S tokens, T = B*S; P streams, K blocks, d width, V vocabulary. P = E = K = 1 is exactly the plain decoder. With AltUp's wide form
embedding, last norm and head are K*d wide.

A pipeline stage is a decoder that lacks parts: other stages' layers, the embedding, or norm, aggregator and head. Tokens, positions,
documents and labels are always those of the whole micro-batch. The state holds this rank's share: of the tokens that of the
context-parallel rank (`share_context`), of these that of the tensor-parallel rank (`share_tokens`); of the streams `streams_here`, where
they are on several ranks. Behind the aggregator each of these ranks has a part of the tokens (`share_labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.size import end_width
from megascale.model.altup import Parts
from megascale.model.attention import Attention, Borders, KeyValueCache, Packing, document_borders, pack
from megascale.model.exchange import Exchange, identity
from megascale.model.layers import RMSNorm, SwiGLU
from megascale.model.loss import IGNORED
from megascale.model.origin import Draw, Origin, origin_of
from megascale.model.reinforce import join_policies, reinforce
from megascale.model.residual import contract, expand, residual_of
from megascale.model.routing import Experts
from megascale.model.streams import Aggregator
from megascale.model.strided import SequenceResidual
from megascale.model.vocabulary import Embedding, Head

FP32_PARAMETERS = ("*norm.weight", "*.router.*", "*.residual.*")
"""Shell patterns of the parameters that stay fp32 when the others are bf16."""


AUXILIARY = ("balance", "router_z", "entropy")
"""Losses in the routers' reports (see `Router`); their other entries are named by layer."""
NO_DRAW = Draw()


def is_routed(layer: int, model: Model) -> bool:
    """Whether a layer's feed-forward has experts."""
    return model.experts.count > 1 and layer % model.experts.every == model.experts.offset


def layer_metrics(layer: int) -> str:
    """What the names of a routed layer's metrics start with."""
    return f"moe/layer_{layer:02d}"


class Layer(nn.Module):
    """x -> x + attention(norm(x)) -> + feed-forward(norm(.)), on one block of the state."""

    def __init__(self, model: Model, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(model.width, model.norm_eps)
        self.attention = Attention(model)
        self.feed_forward_norm = RMSNorm(model.width, model.norm_eps)
        assert model.ffn_width is not None
        self.feed_forward = Experts(model) if is_routed(layer, model) else SwiGLU(model.width, model.ffn_width)
        self.residual = residual_of(model, layer)
        if isinstance(self.residual, SequenceResidual) and model.sliding_window:
            self.attention.window = -(-model.sliding_window // model.altup.stride)  # it counts kept tokens

    def forward(
        self, state: Tensor | Parts, packing: Packing, origin: Origin, only_update: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next state, or only what the residual makes it of (see `megascale.model.residual`), and the router's report (empty for a
        dense layer). The state may come in its parts.
        """
        parts = self.residual.split(state) if isinstance(state, Tensor) else state
        block = self.residual.read(parts, packing)
        here, there = self._tokens(packing, origin)
        update, report = self._finish(block, self.attention(self.attention_norm(block), here, there.stream), there)
        return (update if only_update else self.residual(parts, update, packing)), report

    def decode(self, state: Tensor, packing: Packing, origin: Origin, cache: KeyValueCache, layer: int) -> Tensor:
        """`forward` for the next tokens of cached texts."""
        parts, residual = self.residual.split(state), self.residual
        here, there = self._tokens(packing, origin)
        if isinstance(residual, SequenceResidual) and not len(here.cos):
            return residual.add(parts[0], cache.shifts[layer])
        block = residual.read(parts, packing)
        update, _ = self._finish(block, self.attention.decode(self.attention_norm(block), here, cache, layer), there)
        if isinstance(residual, SequenceResidual):
            cache.shifts[layer] = residual.shift(block, update).unflatten(0, (cache.batch, -1))[:, -1]
        return residual(parts, update, packing)

    def _tokens(self, packing: Packing, origin: Origin) -> tuple[Packing, Origin]:
        """Of the tokens that the layer computes on."""
        if not isinstance(self.residual, SequenceResidual):
            return packing, origin
        assert packing.kept is not None
        return packing.kept.packing, origin.take(packing.kept.tokens)

    def _finish(self, block: Tensor, attention: Tensor, origin: Origin) -> tuple[Tensor, dict[str, Tensor]]:
        attended = block + attention
        normed, report = self.feed_forward_norm(attended), {}
        if isinstance(self.feed_forward, Experts):
            fed, report = self.feed_forward(normed, origin)
        else:
            fed = self.feed_forward(normed)
        return self.residual.combine(attended, attention, fed), report


def _run_layer(layer: Layer, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, dict[str, Tensor]]:
    return layer(state, packing, origin)


def _run_streams(decoder: Decoder, state: Tensor, packing: Packing, origin: Origin) -> tuple[Tensor, dict[str, Tensor]]:
    return decoder.run(state, packing, origin)


def _run_end(decoder: Decoder, state: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `Decoder.join` gives, and in training the streams' mean similarity [T]."""
    states, aggregator = decoder.last_states(state), decoder.aggregator
    similar = aggregator.similarity(states) if decoder.training and aggregator is not None else None
    return *decoder.aggregate(states), similar


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch, this stage's and this rank's part: what is differentiated, and what is only reported."""

    lm: Tensor | None
    """sum of the token losses times the given scale, the same on ranks that share the vocabulary; none but on the last stage"""
    auxiliary: dict[str, Tensor]
    """balance, router_z, entropy: summed over layers, not weighted; the sum over ranks is the loss"""
    rewarded: dict[str, Tensor]
    """policy, baseline of rl_r, of the whole model: scaled as lm is, not weighted; the sum over ranks is the loss; empty but on the last
    stage"""
    policies: Tensor | None
    """[T of this rank, P, routed layers, 3] for the next stage (see `megascale.model.reinforce`); none but with rl_r before the last"""
    token_losses: Tensor | None
    """nats, of the tokens whose loss is computed here (`share_labels`), 0 where there is no label; none but on the last stage"""
    statistics: dict[str, Tensor]
    """moe/layer_NN/load -> [P, E], choices of the tokens here; other names -> [2], a sum and its weight"""
    stream_weights: Tensor | None
    """[T of this rank, P] of the aggregator; with streams on several ranks, of this rank's share of the tokens"""
    stream_similarity: Tensor | None
    """[T of this rank] as above, mean cosine between the streams' final states; in training alone"""


class Decoder(nn.Module):
    """A language model over a resolved `Model` config (see `megascale.config.resolve`)."""

    embedding: Embedding | None
    norm: RMSNorm | None
    aggregator: Aggregator | None
    head: Head | None

    def __init__(self, model: Model):
        super().__init__()
        assert model.vocab_size is not None
        self.config = model
        self.run_layer: Callable[[Any, Tensor, Packing, Origin], tuple[Tensor, dict[str, Tensor]]] = _run_layer
        self.run_streams = _run_streams
        self.run_end = _run_end
        self.share_tokens: Exchange = identity
        self.share_context: Exchange = identity
        self.join_context: Exchange = identity
        self.share_labels: Exchange = identity
        self.join_losses: Exchange = identity
        self.document_borders: Borders = document_borders
        self.streams_here = range(model.streams.count)
        ends = end_width(model)
        self.embedding = Embedding(model.vocab_size, ends)
        self.layers = nn.ModuleDict({str(i): Layer(model, i) for i in range(model.layers)})
        self.norm = RMSNorm(ends, model.norm_eps)
        streams = model.streams
        self.aggregator = Aggregator(ends, streams.count, streams.smoothing, model.width) if streams.count > 1 else None
        self.head = Head(model.vocab_size, ends)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """The state [T, 1, K, d] before the first layer, of tokens [T]: the streams do not differ yet."""
        assert self.embedding is not None, "the first stage has the embedding"
        return expand(self.embedding(tokens), 1, self.config)

    def run(
        self, state: Tensor, packing: Packing, origin: Origin, watch: Callable[[str, Tensor], None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The state behind the layers here, and the routers' reports: losses summed over layers, the rest named by layer.

        `watch` sees each layer's name and the state behind it.
        """
        reports: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            state, report = self.run_layer(layer, state, packing, origin.at(int(name)))
            if watch is not None:
                watch(name, state)
            for key, value in report.items():
                if key in AUXILIARY:
                    reports[key] = reports[key] + value if key in reports else value
                else:
                    reports[f"{layer_metrics(int(name))}/{key}"] = value
        return state, reports

    def join(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last hidden states [T, d] of the state, and the aggregator's weights [T, P] (none for P = 1)."""
        return self.aggregate(self.last_states(state))

    def last_states(self, state: Tensor) -> Tensor:
        """The streams' final states [T, P, d], behind the norm."""
        assert self.norm is not None, "the last stage has the norm"
        return self.norm(contract(state, self.config))

    def aggregate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `join`; of the streams' final states [T, P, d]."""
        return (x.squeeze(1), None) if self.aggregator is None else self.aggregator(x)

    def hidden(
        self, tokens: Tensor, positions: Tensor, documents: Tensor, watch: Callable[[str, Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Last hidden states [T, d] of tokens [B, S], the aggregator's weights and the routers' reports. `positions` restart at each
        document, `documents` numbers them inside a text; `watch` as in `run`.
        """
        packing, origin = pack(positions, documents, self.config), origin_of(tokens, NO_DRAW, identity)
        state, reports = self.run(self.embed(tokens.flatten()), packing, origin, watch)
        return *self.join(state), reports

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Logits [B, S, V]; arguments as in `hidden`."""
        assert self.head is not None
        return self.head(self.hidden(tokens, positions, documents)[0]).view(*tokens.shape, -1)

    def advance(
        self,
        state: Tensor | None,
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor,
        labels: Tensor,
        scale: Tensor,
        draw: Draw = NO_DRAW,
        policies: Tensor | None = None,
    ) -> tuple[Tensor, Losses]:
        """One stage's part of a micro-batch: from the state of the stage before (none: this is the first) to the next state and the losses.

        labels [B, S] (IGNORED: none); `scale` multiplies each token's loss (one over their number); `draw` is for routers that draw;
        `policies` those of the stage before (see `Losses`).
        """
        state = self.embed(self.share_context(tokens.flatten())) if state is None else state
        packing = pack(positions, documents, self.config, self.share_context, self.document_borders)
        origin = origin_of(tokens, draw, lambda x: self.share_tokens(self.share_context(x)))
        if len(self.streams_here) < self.config.streams.count:
            origin = origin.of_streams(self.streams_here)
        state, reports = self.run_streams(self, state, packing, origin)
        auxiliary = {key: reports.pop(key) for key in AUXILIARY if key in reports}
        routed = [layer for layer in range(self.config.layers) if is_routed(layer, self.config)]
        found = {layer: reports.pop(name) for layer in routed if (name := f"{layer_metrics(layer)}/policy") in reports}
        policies = join_policies(policies, found, routed)
        if self.head is None:
            return state, Losses(None, auxiliary, {}, policies, None, reports, None, None)
        x, weights, similar = self.run_end(self, state)
        labels = self.share_context(labels.flatten())
        lm, token_losses = self.head.loss(x, self.share_labels(labels), scale)
        rewarded: dict[str, Tensor] = {}
        if policies is not None:
            reward, labelled = -self.share_tokens(self.join_losses(token_losses)), self.share_tokens(labels) != IGNORED
            rewarded, noise = reinforce(policies, reward, labelled, scale, self.config.streams.count)
            reports |= {f"{layer_metrics(layer)}/policy_noise": row for layer, row in zip(routed, noise, strict=True)}
        return state, Losses(lm, auxiliary, rewarded, None, token_losses, reports, weights, similar)

    def losses(
        self, tokens: Tensor, positions: Tensor, documents: Tensor, labels: Tensor, scale: Tensor, draw: Draw = NO_DRAW
    ) -> Losses:
        """The losses of a micro-batch of a whole decoder; arguments as in `advance`."""
        return self.advance(None, tokens, positions, documents, labels, scale, draw=draw)[1]

    def cache(self, batch: int, tokens: int) -> KeyValueCache:
        """For the keys and values of the layers and heads here, of `batch` texts of at most so many tokens."""
        layers = [layer for layer in self.layers.values() if isinstance(layer, Layer)]
        weight = layers[0].attention.k.weight
        return KeyValueCache(
            self.config, batch, tokens, weight, map(int, self.layers), weight.shape[0] // layers[0].attention.head_dim
        )

    def decode(self, tokens: Tensor, cache: KeyValueCache, state: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the last of m new tokens [B, m] behind the cached ones, which grow by m; of a stage that is not the last, the
        state. `state` is that of the stage before. Tensor-parallel ranks share the B texts.
        """
        batch, new = tokens.shape
        positions = torch.arange(cache.length, cache.length + new, device=tokens.device).expand(batch, -1)
        packing = pack(positions, torch.zeros_like(positions), self.config)
        state = self.embed(tokens.flatten()) if state is None else state
        origin = origin_of(tokens, NO_DRAW, self.share_tokens)
        for name, layer in self.layers.items():
            assert isinstance(layer, Layer)
            state = layer.decode(state, packing, origin, cache, int(name))
        cache.length += new
        if self.head is None:
            return state
        last = state.unflatten(0, (-1, new))[:, -1]
        return self.head(self.join(last)[0])
