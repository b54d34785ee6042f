"""Tiny random models of transformers, and the same models as configs of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from megascale.config.schema import Model
from tiny import tiny_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
EXPERTS = {"count": 4, "per_token": 2, "width": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    """A class of transformers with settings, and our `Model` for it."""

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return tiny_model(**self.ours)

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Their model with random weights, none of them at a neutral start."""
        settings = getattr(transformers, f"{self.kind}Config")(**{**SHAPE, **self.config}, attn_implementation="eager")
        torch.manual_seed(seed)
        model = getattr(transformers, f"{self.kind}ForCausalLM")(settings).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
        return model.to(dtype)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> nn.Module:
        """Their model, saved as they save it."""
        model = self.build(dtype)
        model.save_pretrained(folder, max_shard_size=shard)
        return model


CASES: dict[str, Case] = {
    "Llama": Case("Llama"),
    "Llama 3.1": Case(
        "Llama", {"rope_parameters": LLAMA3}, {"rotary": {"scaling": "llama3", "factor": 4.0, "original_context": 16}}
    ),
    "tied Llama": Case("Llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "wide heads": Case("Llama", {"head_dim": 16}, {"head_dim": 16}),
    "Qwen2": Case("Qwen2", {}, {"qkv_bias": True}),
    "Qwen2 yarn": Case(
        "Qwen2",
        {"rope_parameters": YARN},
        {"qkv_bias": True, "rotary": {"scaling": "yarn", "factor": 4.0, "original_context": 16}},
    ),
    "Qwen2 window": Case(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        {"qkv_bias": True, "sliding_window": 5},
    ),
    "Qwen3": Case("Qwen3", {}, {"qk_norm": True}),
    "Mistral": Case("Mistral", {"sliding_window": 5}, {"sliding_window": 5}),
    "Mistral without window": Case("Mistral", {"sliding_window": None}),
    "Mixtral": Case("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"experts": EXPERTS}),
    "Qwen3-MoE": Case(
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
        {"qk_norm": True, "experts": {"count": 4, "per_token": 2, "width": 16}},
    ),
    "Qwen3-MoE window": Case(
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        {"qk_norm": True, "sliding_window": 5, "experts": {"count": 4, "per_token": 2, "width": 16}},
    ),
    "Qwen3 window": Case(
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        {"qk_norm": True, "sliding_window": 5},
    ),
    "Qwen3-MoE, every second layer, k = 1": Case(
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
        {"qk_norm": True, "experts": {"count": 4, "per_token": 1, "width": 16, "every": 2, "offset": 1}},
    ),
}
