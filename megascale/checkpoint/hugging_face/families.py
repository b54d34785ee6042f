"""The families: how each spells its settings and names its tensors. Checked against the classes of transformers 5.23.

Families that differ in nothing but a table row are one row; what does not fit a row is in settings.py and tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Names = Mapping[str, str]
"""Our parameter -> their tensor. {layer} stands for a number; {expert} only in theirs: one tensor for each row of our [E, ...]."""


@dataclass(frozen=True)
class Family:
    """A model_type of config.json.

    Attributes:
        model_type, architecture: as in config.json.
        settings: key of config.json -> path of a `Model` setting.
        constants: `Model` settings that all models of the family share.
        defaults: values of keys that a file may lack: the defaults of the class in transformers.
        fixed: keys that change the maths, with the only value that we compute; a file may lack them.
        theta: rotary base where config.json names none.
        window: whether the family has sliding windows never, for all layers whenever one is given, or behind a switch.
        tensors: all names.
        other_keys: keys that settings.py reads beside `settings`.
        custom_code: whether `auto_map` belongs to the format.
    """

    model_type: str
    architecture: str
    settings: Mapping[str, str]
    tensors: Names
    constants: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    theta: float = 10000.0
    window: Literal["never", "always", "switched"] = "never"
    other_keys: tuple[str, ...] = ()
    custom_code: bool = False


NEUTRAL = (
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "output_router_logits",
    "router_aux_loss_coef", "pretraining_tp", "tokenizer_class",
)  # fmt: skip
"""Keys that do not change what the model computes: kept for the export, not interpreted."""

_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_width",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_DEFAULTS = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_QWEN_DEFAULTS = {**_DEFAULTS, "sliding_window": 4096, "max_window_layers": 28}
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "is_encoder_decoder": False}
_BIASES = {"attention_bias": False}
"""`attention_bias` puts a bias on the output projection too, which we do not have."""

_ENDS = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
_OURS, _THEIRS = "layers.{layer}.", "model.layers.{layer}."
_NORMS = {
    f"{_OURS}attention_norm.weight": f"{_THEIRS}input_layernorm.weight",
    f"{_OURS}feed_forward_norm.weight": f"{_THEIRS}post_attention_layernorm.weight",
}
_ATTENTION = {f"{_OURS}attention.{x}.weight": f"{_THEIRS}self_attn.{x}_proj.weight" for x in "qkvo"}
_QKV_BIAS = {f"{_OURS}attention.{x}.bias": f"{_THEIRS}self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORM = {f"{_OURS}attention.{x}_norm.weight": f"{_THEIRS}self_attn.{x}_norm.weight" for x in "qk"}
_PARTS = ("gate", "up", "down")
_MLP = {f"{_OURS}feed_forward.{x}.weight": f"{_THEIRS}mlp.{x}_proj.weight" for x in _PARTS}
_PLAIN = {**_ENDS, **_NORMS, **_ATTENTION, **_MLP}
_STREAMS = {
    **{f"{_OURS}attention.prefix_{x}": f"{_THEIRS}self_attn.prefix_{x}" for x in "kv"},
    **{
        f"aggregator.{ours}.{kind}": f"model.aggregate_layer.{theirs}.{kind}"
        for ours, theirs in (("hidden", 0), ("mix", 2))
        for kind in ("weight", "bias")
    },
}
_ROUTER = {f"{_OURS}feed_forward.router.weight": f"{_THEIRS}mlp.gate.weight"}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _SETTINGS,
    _PLAIN,
    defaults={**_DEFAULTS, "num_key_value_heads": None},
    fixed={**_FIXED, **_BIASES, "mlp_bias": False},
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _SETTINGS,
    _PLAIN,
    defaults={**_DEFAULTS, "sliding_window": 4096},
    fixed=_FIXED,
    window="always",
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _SETTINGS,
    {**_PLAIN, **_QKV_BIAS},
    constants={"qkv_bias": True},
    defaults=_QWEN_DEFAULTS,
    fixed=_FIXED,
    window="switched",
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _SETTINGS,
    {**_PLAIN, **_QK_NORM},
    constants={"qk_norm": True},
    defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    fixed={**_FIXED, **_BIASES},
    window="switched",
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    {**_SETTINGS, "num_local_experts": "experts.count", "num_experts_per_tok": "experts.per_token"},
    {
        **{ours: theirs for ours, theirs in _PLAIN.items() if ours not in _MLP},
        f"{_OURS}feed_forward.router.weight": f"{_THEIRS}block_sparse_moe.gate.weight",
        **{
            f"{_OURS}feed_forward.{ours}": f"{_THEIRS}block_sparse_moe.experts.{{expert}}.{theirs}.weight"
            for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
    },
    defaults={**_DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": None},
    fixed={**_FIXED, "router_jitter_noise": 0.0},
    theta=1e6,
    window="always",
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {
        **_SETTINGS,
        "num_experts": "experts.count",
        "num_experts_per_tok": "experts.per_token",
        "moe_intermediate_size": "experts.width",
    },
    {
        **_PLAIN,  # layers between the routed ones are dense
        **_QK_NORM,
        **_ROUTER,
        **{f"{_OURS}feed_forward.{x}": f"{_THEIRS}mlp.experts.{{expert}}.{x}_proj.weight" for x in _PARTS},
    },
    constants={"qk_norm": True},
    defaults={**_QWEN_DEFAULTS, "max_window_layers": 0},
    fixed={**_FIXED, **_BIASES, "mlp_only_layers": []},
    window="switched",
    other_keys=("num_local_experts", "decoder_sparse_step", "norm_topk_prob"),
)
PARSCALE = Family(
    "qwen2_parscale",
    "Qwen2ParScaleForCausalLM",
    {
        **_SETTINGS,
        "parscale_n": "streams.count",
        "parscale_n_tokens": "streams.prefix_tokens",
        "parscale_attn_smooth": "streams.smoothing",
    },
    {**_PLAIN, **_QKV_BIAS, **_STREAMS},
    constants={"qkv_bias": True},
    # the class of the published models takes 0.01 where config.json has no smoothing; their config.json all say 0.1
    defaults={**_DEFAULTS, "parscale_n": 1, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.01},
    fixed={**_FIXED, "use_sliding_window": False, "rope_scaling": None},
    other_keys=("sliding_window", "max_window_layers"),
    custom_code=True,
)
MEGASCALE = Family(
    "megascale",
    "MegascaleForCausalLM",
    {},
    {
        **_PLAIN,
        **_QKV_BIAS,
        **_QK_NORM,
        **_STREAMS,
        **_ROUTER,
        **{
            f"{_OURS}feed_forward.router.{x}": f"{_THEIRS}mlp.gate.{x}"
            for x in ("bias", "table", "baseline_hidden", "baseline_out")
        },
        **{f"{_OURS}feed_forward.{x}": f"{_THEIRS}mlp.experts.{x}_proj" for x in _PARTS},
        **{f"{_OURS}feed_forward.shared.{x}.weight": f"{_THEIRS}mlp.shared_expert.{x}_proj.weight" for x in _PARTS},
        **{f"{_OURS}residual.{x}": f"{_THEIRS}altup.{x}" for x in ("predict", "correct", "modality", "modality_norm")},
    },
    custom_code=True,
)
"""Any composition: the `Model` settings stand in config.json under `megascale`, as they are."""

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, QWEN3_MOE, PARSCALE, MEGASCALE)}
"""By model_type; an export takes the first that can express the model."""
