"""Import: every tensor byte for byte, there and back, and what transformers computes from the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from foreign import CASES
from megascale.checkpoint.hugging_face.export_folder import Export, export_checkpoint
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.checkpoint.hugging_face.settings import choose_family, essential, read_model
from megascale.checkpoint.load import CheckpointReader
from megascale.config.checks import check
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Streams
from megascale.train.load_run import load_model, open_checkpoint, read_run_config

ROOT = Path(__file__).parents[2]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def export_run(run: Path, target: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"tokenizer": None, "neutral": {}, "dtype": None, "largest": 10**9, **options}
    with open_checkpoint(run, None) as reader:
        return export_checkpoint(reader, Export(run, read_run_config(run).model, **given), target)


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_changes_no_byte(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights in several files, and config.json as transformers writes it."""
    other = CASES[case].save(tmp_path / "hf", dtype, shard="40KB")
    facts = import_folder(tmp_path / "hf", tmp_path / "run")
    assert facts["tensors"] == len(tensors_of(tmp_path / "hf")) and not facts["left_out"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in other.parameters())
    assert essential(read_run_config(tmp_path / "run").model) == essential(CASES[case].model)
    assert not [line for line in check(load_config(tmp_path / "run/config.yaml")) if "model" in line and "window" not in line]
    export_run(tmp_path / "run", tmp_path / "out", largest=30_000)
    same_bytes(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((tmp_path / "hf/config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_of_a_family_is_loaded_by_its_class(case: str, tmp_path: Path) -> None:
    """config.json written from the `Model` alone: transformers computes the same from it."""
    other = CASES[case].save(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/hugging_face")
    facts = export_run(tmp_path / "run", tmp_path / "out", neutral={"max_position_embeddings": 64})
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert facts["family"] == ("llama" if case == "Mistral without window" else other.config.model_type)
    tokens = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(back(input_ids=tokens).logits, other(input_ids=tokens).logits)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_and_its_import_compute_what_transformers_computes(case: str, tmp_path: Path) -> None:
    other = CASES[case].save(tmp_path / "hf", shard="40KB")
    import_folder(tmp_path / "hf", tmp_path / "run")
    tokens = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(19).expand(2, -1)
    with torch.no_grad():
        expected = other(input_ids=tokens).logits
    for folder in (tmp_path / "hf", tmp_path / "run"):
        decoder = load_model(folder).decoder
        torch.testing.assert_close(decoder(tokens, positions, torch.zeros_like(positions)), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_stored_as_fp32_masters(tmp_path: Path) -> None:
    CASES["Mixtral"].save(tmp_path / "hf", torch.bfloat16)
    import_folder(tmp_path / "hf", tmp_path / "run")
    with CheckpointReader(tmp_path / "run/checkpoints/step-00000000") as reader:
        assert {reader.dtype(name) for name in reader.names()} == {torch.float32}
        assert reader.shape("model/layers.0.feed_forward.gate") == (4, 64, 32)
        stored = tensors_of(tmp_path / "hf")["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
        assert torch.equal(reader.read("model/layers.0.feed_forward.gate")[3].bfloat16(), stored)


@pytest.mark.parametrize(
    ("shipped", "family"),
    [("llama_3.2_1b", "llama"), ("llama_3.1_8b", "llama"), ("qwen3_30b_a3b", "qwen3_moe"), ("parscale_1.6b", "qwen2")],
)
def test_shipped_configs_of_known_models_are_of_their_family(shipped: str, family: str) -> None:
    config = resolve(load_config(ROOT / f"configs/models/{shipped}.yaml").config)
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or 1000})
    assert choose_family(model, None).model_type == family
    if family == "qwen2":
        streams = model.model_copy(update={"streams": Streams(count=8)})
        assert choose_family(streams, None).model_type == "qwen2_parscale"


OLDER = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def test_the_older_spelling_of_rotary_settings_is_read() -> None:
    model = read_model(OLDER, "config.json")
    rotary = model.rotary
    assert (rotary.theta, rotary.scaling, rotary.factor, rotary.original_context) == (500000.0, "llama3", 32.0, 8192)
    assert model.tie_embeddings and model.norm_eps == 1e-5 and model.kv_heads == 8


SIZES = {"vocab_size": 97, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
MOE_SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("kind", "model_type", "more"),
    [
        ("Llama", "llama", {}),
        ("Mistral", "mistral", {}),
        ("Qwen2", "qwen2", {}),
        ("Qwen2", "qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
        ("Qwen3", "qwen3", {}),
        ("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen3Moe", "qwen3_moe", {"num_experts": 4, **MOE_SIZES}),
        ("Qwen3Moe", "qwen3_moe", {"num_experts": 4, **MOE_SIZES, "use_sliding_window": True}),
    ],
)
def test_a_key_that_is_not_there_has_the_default_of_their_class(kind: str, model_type: str, more: dict[str, Any]) -> None:
    theirs = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    model = read_model({"model_type": model_type, **SIZES, **more}, "config.json")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    expected = (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.initializer_range, head_dim)
    assert (model.norm_eps, model.tie_embeddings, model.init_std, model.head_dim) == expected
    assert model.rotary.theta == theirs.rope_parameters["rope_theta"]
    assert model.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("layers", [2, 28])
def test_a_window_that_no_layer_has_is_none(layers: int) -> None:
    values: dict[str, Any] = {key: value for key, value in OLDER.items() if key not in ("mlp_bias", "attention_bias")}
    values |= {"model_type": "qwen2", "num_hidden_layers": 2, "sliding_window": 9, "max_window_layers": layers}
    assert read_model({**values, "use_sliding_window": True}, "config.json").sliding_window is None
    assert read_model({**values, "use_sliding_window": False, "max_window_layers": 0}, "config.json").sliding_window is None
    assert read_model({**values, "use_sliding_window": True, "max_window_layers": 0}, "config.json").sliding_window == 9
