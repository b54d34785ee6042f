"""Settings of a megascale model for transformers; see modeling_megascale.py."""

import math
from typing import Any

from transformers import PretrainedConfig

STANDARD = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_embeddings",
}
"""Names by which other tools look for settings."""


class MegascaleConfig(PretrainedConfig):
    """The settings of a model, as megascale names them, in `megascale`."""

    model_type = "megascale"

    def __init__(self, megascale: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.megascale = megascale
        for theirs, ours in STANDARD.items():
            setattr(self, theirs, megascale[ours] if megascale else None)


class ParScaleConfig(MegascaleConfig):
    """The published format of ParScale models (arXiv 2505.10475): Qwen2 with P streams."""

    model_type = "qwen2_parscale"

    def __init__(self, parscale_n: int = 1, parscale_n_tokens: int = 48, parscale_attn_smooth: float = 0.01, **kwargs: Any):
        kwargs.pop("megascale", None)
        if kwargs.get("use_sliding_window") or kwargs.get("rope_scaling"):
            raise ValueError("sliding windows and scaled rotary embeddings are not part of the ParScale format")
        kwargs["sliding_window"] = None  # published configs name one that is off; caches would believe it
        settings = dict(kwargs)
        if kwargs.get("hidden_size"):
            theta = (kwargs.get("rope_parameters") or kwargs).get("rope_theta", 10000.0)
            settings = {
                **{ours: kwargs.get(theirs) for theirs, ours in STANDARD.items()},
                "head_dim": kwargs.get("head_dim") or kwargs["hidden_size"] // kwargs["num_attention_heads"],
                "tie_embeddings": kwargs.get("tie_word_embeddings", False),
                "ffn_width": kwargs["intermediate_size"],
                "norm_eps": kwargs.get("rms_norm_eps", 1e-6),
                "qkv_bias": True,
                "qk_norm": False,
                "sliding_window": None,
                "rotary": {"theta": theta, "scaling": "none"},
                "streams": {"count": parscale_n, "prefix_tokens": parscale_n_tokens, "smoothing": parscale_attn_smooth},
                "experts": {"count": 1},
                "altup": {"blocks": 1, "form": "recycled"},
            }
        super().__init__(settings or None, **kwargs)
        self.parscale_n, self.parscale_n_tokens, self.parscale_attn_smooth = parscale_n, parscale_n_tokens, parscale_attn_smooth


def rotary_frequencies(head_dim: int, rotary: dict[str, Any]) -> tuple[list[float], float]:
    """Radians per token of each pair [D/2], and the factor on cos and sin (llama3: Llama 3.1 report, 3.4; yarn: arXiv 2309.00071)."""
    frequencies = [rotary["theta"] ** -(i / head_dim) for i in range(0, head_dim, 2)]
    if rotary["scaling"] == "none":
        return frequencies, 1.0
    context, factor = rotary["original_context"], rotary["factor"]
    if rotary["scaling"] == "llama3":
        low, high = rotary["low_frequency_factor"], rotary["high_frequency_factor"]
        keep = [(context * frequency / (2 * math.pi) - low) / (high - low) for frequency in frequencies]
    else:

        def pair(turns: float) -> float:
            return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rotary["theta"]))

        first, last = max(math.floor(pair(rotary["beta_fast"])), 0), min(math.ceil(pair(rotary["beta_slow"])), head_dim - 1)
        keep = [1 - (i - first) / max(last - first, 0.001) for i in range(head_dim // 2)]
    scale = 0.1 * math.log(factor) + 1.0 if rotary["scaling"] == "yarn" and factor > 1 else 1.0
    clamped = [min(max(share, 0.0), 1.0) for share in keep]
    return [f * (share + (1 - share) / factor) for f, share in zip(frequencies, clamped, strict=True)], scale
