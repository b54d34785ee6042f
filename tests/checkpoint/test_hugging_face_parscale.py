"""The published ParScale format (arXiv 2505.10475), key by key, against an independent forward pass over the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megascale.checkpoint.hugging_face.export_folder import Export, export_checkpoint
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.checkpoint.hugging_face.settings import read_model
from megascale.config.errors import InputError
from megascale.train.load_run import load_model, open_checkpoint, read_run_config

LAYERS, WIDTH, HEADS, KV, HIDDEN, VOCABULARY, PREFIX = 2, 32, 4, 2, 48, 97, 3
HEAD = WIDTH // HEADS

PUBLISHED = {
    "architectures": ["Qwen2ParScaleForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen2_parscale.Qwen2ParScaleConfig",
        "AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 2048,
    "max_window_layers": 36,
    "model_type": "qwen2_parscale",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "parscale_attn_smooth": 0.1,
    "parscale_n": 4,
    "parscale_n_tokens": PREFIX,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
"""The keys of a published config.json, with small sizes."""


def published_weights(streams: int, tied: bool = True) -> dict[str, Tensor]:
    """Random fp32 tensors under the published names and in the published shapes."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape) * 0.15 + float(len(shape) == 1)

    weights = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH), "model.norm.weight": draw(WIDTH)}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, rows in (("q", HEADS * HEAD), ("k", KV * HEAD), ("v", KV * HEAD)):
            weights[f"{attention}.{name}_proj.weight"], weights[f"{attention}.{name}_proj.bias"] = draw(rows, WIDTH), draw(rows)
        weights[f"{attention}.o_proj.weight"] = draw(WIDTH, HEADS * HEAD)
        weights[f"{mlp}.gate_proj.weight"], weights[f"{mlp}.up_proj.weight"] = draw(HIDDEN, WIDTH), draw(HIDDEN, WIDTH)
        weights[f"{mlp}.down_proj.weight"] = draw(WIDTH, HIDDEN)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = draw(WIDTH)
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"] = draw(WIDTH)
        if streams > 1:
            for name in ("prefix_k", "prefix_v"):
                weights[f"{attention}.{name}"] = draw(streams, KV, PREFIX, HEAD)
    if streams > 1:
        weights["model.aggregate_layer.0.weight"], weights["model.aggregate_layer.0.bias"] = (
            draw(WIDTH, streams * WIDTH),
            draw(WIDTH),
        )
        weights["model.aggregate_layer.2.weight"], weights["model.aggregate_layer.2.bias"] = draw(streams, WIDTH), draw(streams)
    return weights if tied else {**weights, "lm_head.weight": draw(VOCABULARY, WIDTH)}


def reference(w: dict[str, Tensor], tokens: Tensor, streams: int, smoothing: float) -> Tensor:
    """Logits [S, V] of tokens [S]: streams one after the other, prefixes concatenated, a square causal part, columns by index."""
    angles = torch.arange(len(tokens))[:, None] * 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1) * sin

    def heads(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"]).view(len(tokens), -1, HEAD).transpose(0, 1)

    last = []
    for p in range(streams):
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(LAYERS):
            name = f"model.layers.{layer}"
            normed = norm(x, f"{name}.input_layernorm.weight")
            q, k, v = (heads(normed, f"{name}.self_attn.{part}_proj") for part in "qkv")
            q, k = turn(q), turn(k)
            visible = torch.ones(len(tokens), len(tokens)).tril().bool()
            if streams > 1:
                k = torch.cat([w[f"{name}.self_attn.prefix_k"][p], k], 1)
                v = torch.cat([w[f"{name}.self_attn.prefix_v"][p], v], 1)
                visible = torch.cat([torch.ones(len(tokens), PREFIX).bool(), visible], 1)
            k, v = k.repeat_interleave(HEADS // KV, 0), v.repeat_interleave(HEADS // KV, 0)
            scores = (q @ k.transpose(1, 2) / HEAD**0.5).masked_fill(~visible, float("-inf"))
            attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + attended @ w[f"{name}.self_attn.o_proj.weight"].T
            normed = norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up = (normed @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        last.append(norm(x, "model.norm.weight"))
    y = last[0]
    if streams > 1:
        joined = torch.empty(len(tokens), streams * WIDTH)
        for p, x in enumerate(last):
            joined[:, p::streams] = x  # column j*P + p
        hidden = F.silu(F.linear(joined, w["model.aggregate_layer.0.weight"], w["model.aggregate_layer.0.bias"]))
        mix = F.linear(hidden, w["model.aggregate_layer.2.weight"], w["model.aggregate_layer.2.bias"]).softmax(-1)
        mix = mix * (1 - smoothing) + smoothing / streams
        y = sum((mix[:, p : p + 1] * x for p, x in enumerate(last)), torch.zeros(()))
    return y @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def write(folder: Path, streams: int, tied: bool = True, **changes: Any) -> dict[str, Tensor]:
    """A folder in the published format, in two files with an index."""
    folder.mkdir()
    weights = published_weights(streams, tied)
    values = {**PUBLISHED, "parscale_n": streams, "tie_word_embeddings": tied, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    listed = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return weights


def logits(folder: Path, tokens: Tensor) -> Tensor:
    decoder = load_model(folder).decoder
    return decoder(tokens[None], torch.arange(len(tokens))[None], torch.zeros(1, len(tokens), dtype=torch.long))[0]


TOKENS = torch.randint(VOCABULARY, (13,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_published_weights_compute_what_the_paper_says(streams: int, tied: bool, tmp_path: Path) -> None:
    weights = write(tmp_path / "hf", streams, tied)
    assert len(weights) == (14 if streams > 1 else 12) * LAYERS + (6 if streams > 1 else 2) + (not tied)
    import_folder(tmp_path / "hf", tmp_path / "run")
    expected = reference(weights, TOKENS, streams, 0.1)
    for folder in ("hf", "run"):
        torch.testing.assert_close(logits(tmp_path / folder, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_without_the_key_the_smoothing_is_that_of_the_class(tmp_path: Path) -> None:
    weights = write(tmp_path / "hf", 4, parscale_attn_smooth=...)
    torch.testing.assert_close(logits(tmp_path / "hf", TOKENS), reference(weights, TOKENS, 4, 0.01), rtol=1e-5, atol=1e-5)
    assert (reference(weights, TOKENS, 4, 0.01) - reference(weights, TOKENS, 4, 0.1)).abs().max() > 1e-3


@pytest.mark.parametrize("streams", [1, 4])
def test_there_and_back_changes_no_byte(streams: int, tmp_path: Path) -> None:
    """fp32 files although config.json says bfloat16, hidden-major columns, and all keys but the code's names."""
    weights = write(tmp_path / "hf", streams)
    import_folder(tmp_path / "hf", tmp_path / "run")
    with open_checkpoint(tmp_path / "run", None) as reader:
        export = Export(tmp_path / "run", read_run_config(tmp_path / "run").model, None, {}, None, 10**9)
        export_checkpoint(reader, export, tmp_path / "out")
    back = load_file(tmp_path / "out/model.safetensors")
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == torch.float32 and torch.equal(back[name], tensor), name
    values = json.loads((tmp_path / "out/config.json").read_text())
    expected = {**PUBLISHED, "parscale_n": streams}
    assert values.pop("auto_map") != expected.pop("auto_map")
    assert values == expected


@pytest.mark.parametrize("streams", [1, 4])
def test_our_code_computes_the_published_format_in_transformers(
    streams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a cache, which must not believe in the sliding window that config.json names and switches off."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    weights = write(tmp_path / "hf", streams, sliding_window=4)
    import_folder(tmp_path / "hf", tmp_path / "run")
    with open_checkpoint(tmp_path / "run", None) as reader:
        export = Export(tmp_path / "run", read_run_config(tmp_path / "run").model, None, {}, None, 10**9)
        export_checkpoint(reader, export, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS[None]).logits[0]
        torch.testing.assert_close(found, reference(weights, TOKENS, streams, 0.1), rtol=1e-5, atol=1e-5)
        text = model.generate(TOKENS[None], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
        for _ in range(5):
            assert int(reference(weights, text[:-1], streams, 0.1)[-1].argmax()) == int(text[-1])
            text = text[:-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"parscale_n_more": 3}, "parscale_n_more 3"),
        ({"parscale_n": 0}, "parscale_n"),
    ],
)
def test_what_the_format_does_not_have_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_model({**PUBLISHED, **change}, "config.json")


def test_another_number_of_streams_than_the_weights_is_named(tmp_path: Path) -> None:
    write(tmp_path / "hf", 4)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**PUBLISHED, "parscale_n": 2}))
    with pytest.raises(InputError, match=r"prefix_k has shape \(4, 2, 3, 8\), config.json says \(2, 2, 3, 8\)"):
        load_model(tmp_path / "hf")
    path.write_text(json.dumps({**PUBLISHED, "parscale_n": 1}))
    with pytest.raises(InputError, match=r"tensor model\S+ does not belong to a qwen2_parscale model"):
        load_model(tmp_path / "hf")
