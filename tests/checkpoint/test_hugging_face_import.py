"""Import: every tensor byte for byte, there and back; what is not understood is refused by name; a model is never twice in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreign import CASES, Case
from megascale.checkpoint.hugging_face.export_folder import Export, export_checkpoint
from megascale.checkpoint.hugging_face.families import LLAMA
from megascale.checkpoint.hugging_face.folder import open_hugging_face
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.checkpoint.hugging_face.settings import choose_family, essential, read_model
from megascale.checkpoint.hugging_face.tensors import pieces_of
from megascale.checkpoint.load import CheckpointReader
from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Streams
from megascale.train.load_run import load_model, open_checkpoint, read_run_config
from runs import environment

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


PEAK = """
import sys
from pathlib import Path
from megascale.cli import main

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def convert(source, target, to):
    options = ["--shard-gb", "0.05", "--dtype", "bf16"] if to == "hf" else []
    assert main(["convert", source, target, "--to", to, *options]) == 0

folder, tiny = sys.argv[1:]
convert(tiny, tiny + "-run", "run")
convert(tiny + "-run", tiny + "-out", "hf")  # everything is imported and warm now
before = status("VmRSS")
for source, target, to in (("hf", "run", "run"), ("run", "out", "hf")):
    convert(f"{folder}/{source}", f"{folder}/{target}", to)
    print("peak", to, status("VmHWM") - before)
"""


@pytest.mark.slow
def test_a_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """71 million parameters, 285 MB in fp32, in tensors of 17 MB at most: both directions take less than half of that, mapped files
    included.
    """
    config = {**OLDER, "vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False}
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    pieces = pieces_of(LLAMA, read_model(config, "config.json"))
    names: dict[str, str] = {}
    for number in range(4):
        part = pieces[number::4]
        file = f"model-{number}.safetensors"
        save_file({piece.theirs: torch.randn(piece.their_shape).bfloat16() for piece in part}, folder / file)
        names |= dict.fromkeys((piece.theirs for piece in part), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    CASES["Llama"].save(tmp_path / "tiny")
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(tmp_path / "tiny")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(), cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    peaks = {line.split()[1]: int(line.split()[2]) for line in result.stdout.splitlines() if line.startswith("peak")}
    model = 4 * sum(torch.Size(piece.their_shape).numel() for piece in pieces)
    assert set(peaks) == {"run", "hf"} and model > 250e6
    assert max(peaks.values()) < model / 2
    same_bytes(tensors_of(folder), tensors_of(tmp_path / "out"))


def test_transformers_is_not_needed(tmp_path: Path) -> None:
    """Import, export, evaluation and generation of a known family run where it is not installed."""
    CASES["Qwen3-MoE"].save(tmp_path / "hf")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from megascale.cli import main\n"
        f"assert main(['convert', {str(tmp_path / 'hf')!r}, {str(tmp_path / 'run')!r}, '--to', 'run']) == 0\n"
        f"assert main(['convert', {str(tmp_path / 'run')!r}, {str(tmp_path / 'out')!r}, '--to', 'hf']) == 0\n"
        "from megascale.train.load_run import load_model\n"
        f"load_model(Path({str(tmp_path / 'hf')!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
