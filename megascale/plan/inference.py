"""Memory and time of generation on one device: weights, key/value cache of every stream, and a roofline for each token.

b sequences of a batch, P streams, d width, D head width, L layers, V vocabulary, E experts, k per token. Weights and cache have 2 bytes a
number. Decoding reads the weights once and every stream's cache; prompts are bound by FLOPs. Launches of kernels and exchanges between
devices are left out: what is given is a bound that good serving programs come near to, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config.schema import Model
from megascale.config.size import routed_layers
from megascale.model import accounting
from megascale.plan.cluster import Cluster

ELEMENT_BYTES = 2
FORWARD = 1 / 3
"""share of the forward pass in the FLOPs of a training token"""


@dataclass(frozen=True)
class Request:
    """What is generated at a time."""

    prompt: int
    """tokens of a sequence before the first new one"""
    generated: int
    """new tokens of a sequence"""
    batch: int = 1
    """sequences at a time"""

    @property
    def tokens(self) -> int:
        """Tokens of a sequence at the end."""
        return self.prompt + self.generated


@dataclass(frozen=True)
class Conventions:
    """What an analysis counts. The defaults are what a serving program must do."""

    cache_passes: float = 1.0
    """how often a new token passes over the cache; 2: it is loaded and stored again"""
    full_cache: bool = False
    """the cache is as long as at the end for every new token, instead of growing"""
    all_logits: bool = False
    """the prompt's logits are kept for every token, instead of the last one"""
    prefix_tokens: bool = False
    """prefixes count as tokens of every stream: computed with the prompt and held in the cache, instead of shared weights"""
    chunk: int | None = 512
    """tokens of a prompt that are computed at a time; none = all"""


SERVER = Conventions()


@dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    weights: float
    cache: float
    """keys and values of all streams, without the prefixes, which are weights"""
    working: float
    """the larger of a layer's activations and the logits, while the prompt is read"""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.working


def cache_bytes(model: Model, tokens: float, batch: int = 1) -> float:
    """Keys and values of all layers and streams."""
    assert model.kv_heads and model.head_dim
    seen = min(tokens, float(model.sliding_window or tokens))
    return 2.0 * ELEMENT_BYTES * batch * model.streams.count * model.layers * model.kv_heads * model.head_dim * seen


def memory(model: Model, request: Request, conventions: Conventions = SERVER) -> Memory:
    """Bytes that a request needs."""
    assert model.ffn_width and model.vocab_size
    prompt = request.prompt + _prefix(model, conventions)
    rows = request.batch * min(prompt, conventions.chunk or prompt)
    experts = model.experts
    used = (experts.per_token + experts.shared) * (experts.width or 0) if experts.count > 1 else 0
    numbers = (1 + model.altup.blocks) * model.width + 2 * max(model.ffn_width, used)
    layer = ELEMENT_BYTES * rows * model.streams.count * numbers
    logits = ELEMENT_BYTES * model.vocab_size * request.batch * (request.prompt if conventions.all_logits else 1)
    return Memory(
        ELEMENT_BYTES * accounting.parameters(model).total,
        cache_bytes(model, request.tokens + _prefix(model, conventions), request.batch),
        float(max(layer, logits)),
    )


def weights_read(model: Model, batch: int = 1) -> float:
    """Bytes of weights that a step of decoding reads: all but unused experts and, where the head is its own, the embedding's other rows.

    Each of the b P rows picks its k experts by itself and evenly, so E (1 - (1 - k/E)^(b P)) of a layer's experts are read.
    """
    counts, experts = accounting.parameters(model), model.experts
    numbers = float(counts.total)
    if counts.head:
        numbers -= counts.embedding
    if experts.count > 1:
        idle = experts.count * (1 - experts.per_token / experts.count) ** (batch * model.streams.count)
        numbers -= len(routed_layers(model)) * idle * 3 * model.width * (experts.width or 0)
    return ELEMENT_BYTES * numbers


def forward_flops(model: Model, keys: float) -> float:
    """FLOPs of the forward pass of a token that sees so many keys, all streams."""
    return FORWARD * accounting.flops_per_token(model, accounting.mean_visible_keys(keys - 1, model))


def decode_seconds(model: Model, device: Cluster, context: float, batch: int = 1, conventions: Conventions = SERVER) -> float:
    """Of one new token of each sequence, at so many tokens of context: the longer of its FLOPs and its bytes."""
    moved = weights_read(model, batch) + conventions.cache_passes * cache_bytes(
        model, context + _prefix(model, conventions), batch
    )
    return max(_flops_seconds(device, batch * forward_flops(model, context)), _bytes_seconds(device, moved))


def prefill_seconds(model: Model, device: Cluster, prompt: int, batch: int = 1) -> float:
    """Of reading a prompt: layers for every token, aggregator and head for the last one."""
    keys = accounting.mean_visible_keys((prompt - 1) / 2, model)
    layers = accounting.layer_flops_per_token(model, keys) * prompt
    flops = FORWARD * batch * (layers + accounting.end_flops_per_token(model))
    return max(_flops_seconds(device, flops), _bytes_seconds(device, weights_read(model, batch * prompt)))


def request_seconds(model: Model, device: Cluster, request: Request, conventions: Conventions = SERVER) -> float:
    """From a prompt to the last new token."""
    context = request.tokens if conventions.full_cache else request.prompt + (request.generated + 1) / 2
    step = decode_seconds(model, device, context, request.batch, conventions)
    prompt = request.prompt + _prefix(model, conventions)
    return prefill_seconds(model, device, prompt, request.batch) + request.generated * step


def _prefix(model: Model, conventions: Conventions) -> int:
    return model.streams.prefix_tokens * (model.streams.count > 1 and conventions.prefix_tokens)


def _flops_seconds(device: Cluster, flops: float) -> float:
    return flops / (device.peak_flops * device.efficiency.matmul)


def _bytes_seconds(device: Cluster, moved: float) -> float:
    return moved / (device.memory_bandwidth * device.efficiency.memory)
