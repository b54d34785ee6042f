"""A megascale model for transformers: ParScale streams, routed experts and AltUp blocks in any composition.

This file, configuration_megascale.py and residual_megascale.py lie beside exported weights and need torch and transformers only; load
the folder with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. They compute what megascale computes in evaluation,
for generation and plain fine-tuning; losses that balance experts are not part of it.

B texts, S new tokens, N tokens so far with the new ones, P streams, K blocks, d width, H query heads, G key/value heads, D head width,
n prefix slots. Streams are folded into heads: head p*H + h belongs to stream p, so that every cache of transformers holds them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megascale import MegascaleConfig, ParScaleConfig, rotary_frequencies
from .residual_megascale import AltUp, Groups, SequenceAltUp

Table = tuple[Tensor, Tensor]
"""cos and sin [B, 1, S, D/2] of the tokens' positions"""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


def rotary_table(positions: Tensor, m: dict[str, Any]) -> Table:
    """The table of positions [B, S]; angles in fp64, because they are large far into a text."""
    frequencies, scale = rotary_frequencies(m["head_dim"], m["rotary"])
    angles = positions.double()[:, None, :, None] * positions.new_tensor(frequencies, dtype=torch.float64)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [B, heads, S, D]."""
    (first, second), (cos, sin) = x.chunk(2, -1), table
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention [B, S, P, d] -> [B, S, P, d], with learned keys and values before each stream's (no rotary on them)."""

    def __init__(self, m: dict[str, Any], layer: int):
        super().__init__()
        self.layer, self.head_dim, self.streams = layer, m["head_dim"], m["streams"]["count"]
        width, heads, kv_heads = m["width"], m["heads"] * self.head_dim, m["kv_heads"] * self.head_dim
        self.q_proj = nn.Linear(width, heads, bias=m["qkv_bias"])
        self.k_proj = nn.Linear(width, kv_heads, bias=m["qkv_bias"])
        self.v_proj = nn.Linear(width, kv_heads, bias=m["qkv_bias"])
        self.o_proj = nn.Linear(heads, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, m["norm_eps"]) if m["qk_norm"] else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, m["norm_eps"]) if m["qk_norm"] else nn.Identity()
        if self.streams > 1:
            shape = (self.streams, m["kv_heads"], m["streams"]["prefix_tokens"], self.head_dim)
            self.prefix_k, self.prefix_v = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, table: Table, visible: Tensor, cache: Any, room: int = 0) -> Tensor:
        """`room`: heads that the cached values have beside these."""
        batch, new = x.shape[:2]
        heads = (batch, new, -1, self.head_dim)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        if cache is not None:
            heads = v.shape[1]
            roomy = torch.cat([v, v.new_zeros(batch, room, new, self.head_dim)], 1) if room else v
            k, v = cache.update(k, roomy, self.layer)
            v = v[:, :heads]
        if self.streams > 1:
            pairs = ((self.prefix_k, k), (self.prefix_v, v))
            k, v = (torch.cat([prefix.flatten(0, 1).expand(batch, -1, -1, -1).to(y.dtype), y], 2) for prefix, y in pairs)
            visible = F.pad(visible, (self.prefix_k.shape[2], 0), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, new, self.streams, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which k of E experts each row goes to, and with what weight; as in evaluation: nothing is drawn, planned or dropped."""

    table: Tensor
    bias: Tensor

    def __init__(self, m: dict[str, Any]):
        super().__init__()
        experts, width = m["experts"], m["width"]
        self.kind, self.per_token = experts["router"], experts["per_token"]
        self.sigmoid = self.kind == "sigmoid" or (self.kind == "s_base" and experts["gate"] == "sigmoid")
        if self.kind == "hash":
            self.register_buffer("table", torch.zeros(m["vocab_size"], self.per_token, dtype=torch.int32))
        else:
            self.weight = nn.Parameter(torch.zeros(experts["count"], width))
        if self.kind == "sigmoid":
            self.register_buffer("bias", torch.zeros(experts["count"]))
        if self.kind == "rl_r":  # the baseline matters to megascale's training only
            hidden = max(width // 8, 1)
            self.baseline_hidden = nn.Parameter(torch.zeros(hidden, width))
            self.baseline_out = nn.Parameter(torch.zeros(1, hidden))

    def forward(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """gates [T, k] and experts [T, k] of rows [T, d], whose tokens are ids [T]."""
        if self.kind == "hash":
            chosen = self.table[ids].long()
            return torch.full(chosen.shape, 1 / self.per_token, device=chosen.device), chosen
        logits = F.linear(rows.float(), self.weight.float())
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        chosen = (scores + self.bias if self.kind == "sigmoid" else logits).topk(self.per_token, -1).indices
        if self.kind == "rl_r":
            return torch.full(chosen.shape, 1 / self.per_token, device=chosen.device), chosen
        gates = scores.gather(-1, chosen)
        return (gates / gates.sum(-1, keepdim=True) if self.per_token > 1 else gates), chosen


class RoutedFeedForward(nn.Module):
    """E SwiGLUs as stacked tensors, [E, ...], k for each row; shared experts see every row."""

    def __init__(self, m: dict[str, Any]):
        super().__init__()
        experts, width = m["experts"], m["width"]
        into, out = (experts["count"], experts["width"], width), (experts["count"], width, experts["width"])
        shapes = {"gate_proj": into, "up_proj": into, "down_proj": out}
        self.gate = Router(m)
        self.experts = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        self.shared_expert = SwiGLU(width, experts["shared"] * experts["width"]) if experts["shared"] else None

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        gates, chosen = self.gate(rows, ids.flatten())
        result = torch.zeros_like(rows) if self.shared_expert is None else self.shared_expert(rows)
        for e in chosen.unique().tolist():
            here, place = (chosen == e).nonzero(as_tuple=True)
            hidden = F.silu(F.linear(rows[here], self.experts["gate_proj"][e])) * F.linear(rows[here], self.experts["up_proj"][e])
            out = F.linear(hidden, self.experts["down_proj"][e]) * gates[here, place, None].to(x.dtype)
            result = result.index_add(0, here, out)
        return result.view_as(x)


class Layer(nn.Module):
    """One decoder layer on one of K blocks [B, S, P, d]."""

    def __init__(self, m: dict[str, Any], layer: int):
        super().__init__()
        experts = m["experts"]
        routed = experts["count"] > 1 and layer % experts["every"] == experts["offset"]
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(m["width"], m["norm_eps"]) for _ in range(2))
        self.self_attn = Attention(m, layer)
        self.mlp = RoutedFeedForward(m) if routed else SwiGLU(m["width"], m["ffn_width"])
        self.altup: AltUp | SequenceAltUp | None = None
        if m["altup"]["blocks"] > 1:
            self.altup = AltUp(m, layer)
        elif m["altup"]["form"] == "sequence" and 0 < layer < m["layers"] - 1:
            self.altup = SequenceAltUp(m, layer)

    def forward(
        self, blocks: list[Tensor], ids: Tensor, table: Table, visible: Tensor, groups: Groups | None, cache: Any
    ) -> list[Tensor]:
        if isinstance(self.altup, AltUp):
            prediction = self.altup.prediction(blocks)
            _, attention, fed = self.halves(self.altup.read(blocks, prediction), ids, table, visible, cache)
            return self.altup.write(blocks, prediction, attention + fed)
        (x,) = blocks
        if isinstance(self.altup, SequenceAltUp):
            assert groups is not None
            room = self.altup.room(x.shape[2])
            _, attention, fed = self.halves(x, ids, table, groups.visible(visible), cache, room)
            return [self.altup(x, attention + fed, groups, cache)]
        attended, _, fed = self.halves(x, ids, table, visible, cache)
        return [attended + fed]

    def halves(
        self, x: Tensor, ids: Tensor, table: Table, visible: Tensor, cache: Any, room: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + attention, attention and feed-forward, of x [B, S, P, d]."""
        attention = self.self_attn(self.input_layernorm(x), table, visible, cache, room)
        attended = x + attention
        normed = self.post_attention_layernorm(attended)
        fed = self.mlp(normed, ids) if isinstance(self.mlp, RoutedFeedForward) else self.mlp(normed)
        return attended, attention, fed


def end_width(m: dict[str, Any]) -> int:
    """Width of embedding, last norm and head: K*d of AltUp's wide form."""
    return m["width"] * (m["altup"]["blocks"] if m["altup"]["form"] == "wide" else 1)


class Trunk(nn.Module):
    """Embedding to the joined last hidden states."""

    def __init__(self, m: dict[str, Any]):
        super().__init__()
        self.m = m
        ends = end_width(m)
        self.embed_tokens = nn.Embedding(m["vocab_size"], ends)
        self.layers = nn.ModuleList(Layer(m, layer) for layer in range(m["layers"]))
        self.norm = RMSNorm(ends, m["norm_eps"])
        streams, width = m["streams"]["count"], m["width"]
        if streams > 1:
            self.aggregate_layer = nn.Sequential(nn.Linear(streams * ends, width), nn.SiLU(), nn.Linear(width, streams))

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor, groups: Groups | None, cache: Any) -> Tensor:
        streams, altup = self.m["streams"]["count"], self.m["altup"]
        ids, wide = ids.unsqueeze(2).expand(-1, -1, streams), altup["form"] == "wide"
        x = self.embed_tokens(ids)
        blocks = list(x.chunk(altup["blocks"], -1)) if wide else [x] * altup["blocks"]
        table = rotary_table(positions, self.m)
        for layer in self.layers:
            blocks = layer(blocks, ids, table, visible, groups, cache)
        x = torch.cat(blocks, -1) if wide else blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        x = self.norm(x)
        if streams == 1:
            return x.squeeze(2)
        # the hidden layer reads hidden-major: column j*P + p
        weights = self.aggregate_layer(x.transpose(2, 3).flatten(2)).float().softmax(-1)
        smoothing = self.m["streams"]["smoothing"]
        weights = weights * (1 - smoothing) + smoothing / streams
        return (weights[..., None] * x).sum(2).to(x.dtype)


class MegascaleForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model. Masks are [B, N], 1 for tokens and 0 for padding; positions count from the first token of each text."""

    config_class: type[PretrainedConfig] = MegascaleConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegascaleConfig):
        super().__init__(config)
        assert config.megascale is not None
        self.model = Trunk(config.megascale)
        self.lm_head = nn.Linear(end_width(config.megascale), config.vocab_size, bias=False)
        self.post_init()

    def visible(self, new: int, past: int, batch: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """[B, 1, S, N], True where a new token sees a token: itself, and those before it that are no padding, in the window."""
        queries, keys = torch.arange(past, past + new, device=device)[:, None], torch.arange(past + new, device=device)
        seen = keys <= queries
        if self.config.megascale["sliding_window"] is not None:
            seen = seen & (queries - keys < self.config.megascale["sliding_window"])
        seen = seen.expand(batch, 1, -1, -1)
        if mask is not None:
            if mask.shape != (batch, past + new):
                raise ValueError(f"attention_mask {tuple(mask.shape)} is not {(batch, past + new)}, all tokens so far")
            seen = (seen & mask.bool()[:, None, None]) | (queries == keys)  # padding sees itself: a softmax needs one key
        return seen

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        batch, new = input_ids.shape
        use_cache = labels is None if use_cache is None else use_cache
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        past = cache.get_seq_length() if cache is not None else 0
        mask = attention_mask if attention_mask is not None else input_ids.new_ones(batch, past + new)
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        visible = self.visible(new, past, batch, attention_mask, input_ids.device)
        altup = self.config.megascale["altup"]
        groups = Groups(mask, altup["stride"], new) if altup["form"] == "sequence" else None
        x = self.model(input_ids, position_ids.expand(batch, -1), visible, groups, cache)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


class Qwen2ParScaleForCausalLM(MegascaleForCausalLM):
    """The same for the published ParScale format."""

    config_class = ParScaleConfig
