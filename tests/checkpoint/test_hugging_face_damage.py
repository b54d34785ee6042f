"""What is not understood is refused by name: keys of config.json, tensors, damaged and foreign files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreign import CASES, Case
from megascale.checkpoint.hugging_face.folder import open_hugging_face
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.config.errors import InputError


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bias on o": ("Llama", {"attention_bias": True}, "attention_bias True"),
    "bias in the feed-forward": ("Llama", {"mlp_bias": True}, "mlp_bias True"),
    "another activation": ("Qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "dropout": ("Qwen3", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    "partial rotary": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
    "dynamic rope": ("Llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "longrope": ("Llama", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    "rope by layer": ("Qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "yarn with its own scale": (
        "Qwen2 yarn",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, "original_max_position_embeddings": 16}},
        "attention_factor 2.0",
    ),
    "softcap": ("Qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "logit scale": ("Llama", {"logits_scaling": 8}, "logits_scaling 8"),
    "mixed layers": ("Qwen2 window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "window in some layers": (
        "Qwen2 window", {"max_window_layers": 1, "layer_types": ...}, "max_window_layers 1: 1 of 2 layers have no window"
    ),
    "window that llama ignores": ("Llama", {"sliding_window": 7}, "sliding_window 7"),
    "quantised": ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "own code": ("Llama", {"auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map"),
    "gates that are not renormalised": ("Qwen3-MoE", {"norm_topk_prob": False}, "norm_topk_prob False"),
    "one expert per token, renormalised": ("Mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
    "dense layers by list": ("Qwen3-MoE", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "jitter": ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
    "one expert": ("Mixtral", {"num_local_experts": 1}, "1 expert"),
    "two numbers of experts": ("Qwen3-MoE", {"num_experts": 8}, "num_experts"),
    "another family": ("Llama", {"model_type": "gemma2"}, "model_type 'gemma2'"),
    "no width": ("Llama", {"hidden_size": ...}, "lacks hidden_size"),
    "a text for a number": ("Llama", {"num_hidden_layers": "two"}, "num_hidden_layers"),
    "a negative number": ("Llama", {"intermediate_size": -1}, "intermediate_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_we_do_not_compute_are_refused_by_name(name: str, tmp_path: Path) -> None:
    case, changes, named = REFUSED[name]
    CASES[case].save(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(InputError) as error:
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert error.value.place == str(path) and named in error.value.reason
    assert not (tmp_path / "run").exists()


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder with a single file."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def as_index(folder: Path, listed: dict[str, str]) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def listed(folder: Path) -> dict[str, str]:
    return dict.fromkeys(tensors_of(folder), "a.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "model.safetensors: cannot be read as a safetensors file .*: truncated or damaged"),
    "truncated header": (cut_the_header, "truncated or damaged"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(NAME)), f"lacks the tensor {NAME} of shape"),
    "unknown tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(2)})),
        "model.safetensors: tensor model.layers.0.mlp.gate_up_proj.weight does not belong",
    ),
    "one layer too many": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)})),
        "tensor model.layers.2.input_layernorm.weight does not belong",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({NAME: torch.zeros(65, 32)})),
        rf"tensor {NAME} has shape \(65, 32\), config.json says \(64, 32\)",
    ),
    "transposed": (lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].T.contiguous()})), rf"tensor {NAME} has shape \(32, 64\)"),
    "quantised": (lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].to(torch.int8)})), f"tensor {NAME} has dtype torch.int8"),
    "fp64": (lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].double()})), f"tensor {NAME} has dtype torch.float64"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pytorch_model.bin, a pickle"
    ),
    "a file of the index is missing": (
        lambda f: as_index(f, {**listed(f), NAME: "b.safetensors"}), "b.safetensors: is missing"
    ),
    "a tensor of the index is missing": (
        lambda f: as_index(f, {**listed(f), "model.more": "a.safetensors"}), "a.safetensors: lacks the tensor model.more"
    ),
    "a tensor is not in the index": (
        lambda f: as_index(f, {k: v for k, v in listed(f).items() if k != NAME}), f"holds the tensor {NAME}, which .* does not list"
    ),
    "an index that leaves the folder": (lambda f: as_index(f, {NAME: "../a.safetensors"}), "not a plain file name"),
    "a damaged index": (lambda f: as_index(f, []), "weight_map"),  # type: ignore[arg-type]
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_files_are_named(name: str, tmp_path: Path) -> None:
    CASES["Llama"].save(tmp_path / "hf")
    damage, message = DAMAGE[name]
    damage(tmp_path / "hf")
    with pytest.raises(InputError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("run*"))


def test_a_tied_head_in_the_file_has_to_be_the_embedding(tmp_path: Path) -> None:
    """Some files hold it twice; old ones also hold the rotary frequencies."""
    CASES["tied Llama"].save(tmp_path / "hf")

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(tmp_path / "hf", add)
    left_out = import_folder(tmp_path / "hf", tmp_path / "run")["left_out"]
    assert set(left_out) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    rewrite(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"][50, 3].add_(1))
    with pytest.raises(InputError, match="lm_head.weight differs from model.embed_tokens.weight"):
        open_hugging_face(tmp_path / "hf")


def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    """Rows of experts have to fill 16 bytes."""
    case = CASES["Qwen3-MoE"]
    Case(case.kind, {**case.config, "moe_intermediate_size": 6}).save(tmp_path / "hf")
    with pytest.raises(InputError, match="6 is not a multiple of 4"):
        import_folder(tmp_path / "hf", tmp_path / "run")


def test_an_existing_run_is_left_alone(tmp_path: Path) -> None:
    CASES["Llama"].save(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match="exists already"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
