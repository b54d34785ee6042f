"""Export of any composition: what transformers computes from the folder is what we compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.checkpoint.hugging_face.export_folder import Export, export_checkpoint
from megascale.checkpoint.hugging_face.files import TensorFiles
from megascale.checkpoint.hugging_face.folder import open_hugging_face
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.checkpoint.hugging_face.settings import COMPUTED, choose_family, essential, read_model, write_settings
from megascale.checkpoint.layout import full
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.weights import BUFFERS, WEIGHTS
from megascale.config.errors import InputError
from megascale.config.schema import Model
from megascale.model.decoder import Decoder
from megascale.train.load_run import load_model
from tiny import tiny_decoder, tiny_model

P2: dict[str, Any] = {"streams": {"count": 2, "prefix_tokens": 3}}
K3: dict[str, Any] = {"altup": {"blocks": 3}}
WIDE: dict[str, Any] = {"blocks": 3, "form": "wide"}


def experts(router: str = "softmax", **settings: Any) -> dict[str, Any]:
    return {"experts": {"count": 4, "per_token": 2, "width": 16, "router": router, **settings}}


COMPOSITIONS: dict[str, dict[str, Any]] = {
    "P = 2": P2,
    "P = 3, Qwen2": {"streams": {"count": 3, "prefix_tokens": 3}, "qkv_bias": True},
    "P = 2, tied, q/k norm, window": {**P2, "tie_embeddings": True, "qk_norm": True, "sliding_window": 5},
    "P = 2, llama3": {**P2, "rotary": {"scaling": "llama3", "factor": 4.0, "original_context": 16}},
    "yarn, bias and norm": {
        "qk_norm": True,
        "qkv_bias": True,
        "rotary": {"scaling": "yarn", "factor": 4.0, "original_context": 16},
    },
    "K = 3": K3,
    "K = 2, same block, predicted": {"altup": {"blocks": 2, "select": "same", "read": "predicted"}},
    "K = 2, by token, tied": {"altup": {"blocks": 2, "coefficients": "token"}, "tie_embeddings": True},
    "K = 3, by token, predicted": {"altup": {"blocks": 3, "coefficients": "token", "read": "predicted"}},
    "K = 2, wide": {"altup": {"blocks": 2, "form": "wide"}},
    "P x K, wide, by token, tied": {**P2, "altup": {**WIDE, "coefficients": "token"}, "tie_embeddings": True},
    "K = 2, by period": {"layers": 4, "altup": {"blocks": 2, "select": "by_period"}, **experts(every=2, offset=1)},
    "sequence": {"layers": 4, "altup": {"form": "sequence", "stride": 3}},
    "P x sequence x E, window": {
        **P2,
        "layers": 4,
        "head_dim": 10,
        "sliding_window": 5,
        "altup": {"form": "sequence", "stride": 2},
        **experts("sigmoid"),
    },
    "shared experts, every second layer": experts(shared=1, every=2, offset=1),
    "k = 1": experts(per_token=1),
    "sigmoid": experts("sigmoid"),
    "s_base": experts("s_base"),
    "s_base with sigmoid gates": experts("s_base", gate="sigmoid", per_token=1),
    "rl_r": experts("rl_r"),
    "hash": experts("hash"),
    "P x E x K": {**P2, **K3, **experts("sigmoid", shared=1)},
    "P x hash x K": {**P2, **K3, **experts("hash", per_token=1)},
}


def save(decoder: Decoder, folder: Path) -> CheckpointReader:
    """A checkpoint of a decoder's weights and buffers, as the trainer writes them."""
    rectangles = [full(WEIGHTS + name, parameter.detach()) for name, parameter in decoder.named_parameters()]
    rectangles += [full(BUFFERS + name, buffer) for name, buffer in decoder.named_buffers()]
    path = save_checkpoint(
        folder / "checkpoints", 7, rectangles, {}, rank=0, world=1, gather=lambda one: [one], barrier=lambda: None
    )
    return CheckpointReader(path)


def random_decoder(model: Model) -> Decoder:
    """Weights and biases away from any neutral start."""
    decoder = tiny_decoder(model, spread=0.2).eval()
    for name, buffer in decoder.named_buffers():
        if name.endswith("bias"):
            buffer.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    return decoder


def export(decoder: Decoder, folder: Path, **options: Any) -> dict[str, Any]:
    """The decoder as a Hugging Face folder `folder/out`; facts of the export."""
    given_options = {"tokenizer": None, "neutral": {"max_position_embeddings": 64}, "dtype": None, "largest": 10**9, **options}
    with save(decoder, folder) as reader:
        return export_checkpoint(reader, Export(folder, decoder.config, **given_options), folder / "out")


def theirs(folder: Path) -> torch.nn.Module:
    """What transformers makes of an exported folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, dtype=torch.float32)
    return model.eval()


def ours(decoder: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return decoder(tokens, positions, torch.zeros_like(positions))


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of a folder to a cache, which outlives the test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_transformers_computes_any_composition(name: str, tmp_path: Path) -> None:
    """Prefill, decoding with a cache (one token and several at a time), and texts padded on the left."""
    decoder = random_decoder(tiny_model(**COMPOSITIONS[name]))
    export(decoder, tmp_path)
    other = theirs(tmp_path)
    tokens = random_tokens(2, 15)
    expected = ours(decoder, tokens)
    with torch.no_grad():
        close(other(input_ids=tokens).logits, expected)
        cache = None
        for start, stop in ((0, 6), (6, 9), *((i, i + 1) for i in range(9, 15))):
            answer = other(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            close(answer.logits, expected[:, start:stop])
        padded, mask = torch.zeros(2, 19, dtype=torch.long), torch.zeros(2, 19, dtype=torch.long)
        padded[0, 4:], mask[0, 4:] = tokens[0], 1
        padded[1, 8:], mask[1, 8:] = tokens[1, :11], 1
        logits = other(input_ids=padded, attention_mask=mask).logits
        close(logits[0, 4:], expected[0])
        close(logits[1, 8:], expected[1, :11])


@pytest.mark.parametrize(
    "name", ["P = 2", "P x E x K", "P x hash x K", "P = 2, tied, q/k norm, window", "P x sequence x E, window"]
)
def test_generate_continues_padded_texts_as_we_do(name: str, tmp_path: Path) -> None:
    decoder = random_decoder(tiny_model(**COMPOSITIONS[name]))
    export(decoder, tmp_path)
    prompts = [random_tokens(1, 9)[0], random_tokens(1, 5)[0]]
    padded = torch.stack([torch.cat([torch.zeros(9 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([(torch.arange(9) >= 9 - len(p)).long() for p in prompts])
    found = theirs(tmp_path).generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0
    )
    for row, prompt in zip(found, prompts, strict=True):
        text = prompt[None]
        for _ in range(8):
            text = torch.cat([text, ours(decoder, text)[:, -1].argmax(-1)[:, None]], 1)
        assert row[9:].tolist() == text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_what_is_exported_reads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny_model(**COMPOSITIONS[name])
    decoder = random_decoder(model)
    facts = export(decoder, tmp_path, largest=20_000)
    assert len([file for file in facts["files"] if file.endswith(".safetensors")]) > 1
    assert facts["parameters"] == sum(parameter.numel() for parameter in decoder.parameters())
    back = load_model(tmp_path / "out")
    assert essential(back.config.model) == essential(model)
    state = back.decoder.state_dict()
    assert state.keys() == decoder.state_dict().keys()
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["P x E x K", "P x hash x K", "rl_r"])
def test_an_exported_composition_can_be_imported_again(name: str, tmp_path: Path) -> None:
    """As a run: its checkpoint holds the routers' buffers too, and config.yaml the settings of training."""
    model = tiny_model(**COMPOSITIONS[name])
    model = model.model_copy(update={"experts": model.experts.model_copy(update={"z_loss": 0.5})})
    decoder = random_decoder(model)
    export(decoder, tmp_path)
    import_folder(tmp_path / "out", tmp_path / "run")
    back = load_model(tmp_path / "run")
    assert back.config.model == model
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, back.decoder.state_dict()[key]), key


def test_weights_that_transformers_saves_again_are_the_same(tmp_path: Path) -> None:
    """Names, shapes and settings survive their own save_pretrained."""
    model = tiny_model(**COMPOSITIONS["P x E x K"])
    decoder = random_decoder(model)
    export(decoder, tmp_path)
    theirs(tmp_path).save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again/config.json").read_text())
    assert essential(read_model({key: values[key] for key in ("model_type", "megascale")}, "again")) == essential(model)
    stored = open_hugging_face(tmp_path / "out").files.stored
    assert {k: v.shape for k, v in TensorFiles(tmp_path / "again").stored.items()} == {k: v.shape for k, v in stored.items()}


PLAIN = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"experts": {"count": 4, "per_token": 2, "width": 64}},
    "qwen3_moe": {"qk_norm": True, **experts(every=2, offset=1)},
    "qwen2_parscale": {"qkv_bias": True, **P2},
}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_compositions_need_no_code(family: str, tmp_path: Path) -> None:
    decoder = random_decoder(tiny_model(**PLAIN[family]))
    facts = export(decoder, tmp_path)
    assert facts["family"] == family
    assert any(file.endswith(".py") for file in facts["files"]) == (family == "qwen2_parscale")
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        close(theirs(tmp_path)(input_ids=tokens).logits, ours(decoder, tokens))


@settings(max_examples=60)
@given(
    st.fixed_dictionaries(
        {
            "qkv_bias": st.booleans(),
            "qk_norm": st.booleans(),
            "tie_embeddings": st.booleans(),
            "sliding_window": st.sampled_from([None, 7]),
            "head_dim": st.sampled_from([8, 16]),
            "rotary": st.sampled_from(
                [{}, {"theta": 5e5}, {"scaling": "llama3", "factor": 8.0}, {"scaling": "yarn", "factor": 2.0}]
            ),
            "streams": st.sampled_from([{}, {"count": 2}, {"count": 4, "smoothing": 0.2}]),
            "altup": st.sampled_from([{}, {"blocks": 2}, {**WIDE, "coefficients": "token"}, {"form": "sequence"}]),
            "experts": st.sampled_from(
                [{}, {"count": 4, "per_token": 2}, {"count": 4, "width": 8}, {"count": 2, "router": "hash"}]
            ),
        }
    )
)
def test_every_model_has_a_family_that_says_all_of_it(given_settings: dict[str, Any]) -> None:
    model = tiny_model(**given_settings)
    family = choose_family(model, None)
    assert essential(read_model(write_settings(family, model, {}), "config.json")) == essential(model)
    plain = all(not given_settings[part] for part in ("streams", "altup", "experts"))
    if plain and not (given_settings["qkv_bias"] and given_settings["qk_norm"]):
        assert family.model_type in ("llama", "mistral", "qwen2", "qwen3")


def test_dtypes_and_shards(tmp_path: Path) -> None:
    """bf16 weights in several files, but a router's bias and table as they are."""
    decoder = random_decoder(tiny_model(**COMPOSITIONS["P x E x K"]))
    facts = export(decoder, tmp_path, dtype=torch.bfloat16, largest=30_000)
    sizes = [(tmp_path / "out" / file).stat().st_size for file in facts["files"] if file.endswith(".safetensors")]
    assert len(sizes) > 2 and max(sizes) < 40_000
    stored = open_hugging_face(tmp_path / "out").files.stored
    assert {str(one.dtype) for name, one in stored.items() if name.endswith("gate.bias")} == {"torch.float32"}
    assert {str(one.dtype) for name, one in stored.items() if not name.endswith("gate.bias")} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        difference = loaded(input_ids=tokens).logits.float() - ours(decoder, tokens)
    assert loaded.dtype == torch.bfloat16
    assert difference.norm() < 0.1 * ours(decoder, tokens).norm()


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    reader = save(random_decoder(tiny_model()), tmp_path)
    other = Export(tmp_path, tiny_model(width=64), None, {}, None, 10**9)
    with reader, pytest.raises(InputError, match=r"weight embedding.weight has shape \(97, 32\), the model's has \(97, 64\)"):
        export_checkpoint(reader, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(random_decoder(tiny_model()), tmp_path)
    assert (tmp_path / "out/kept").read_text() == "mine"


def test_the_code_beside_the_weights_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    export(random_decoder(tiny_model(**P2)), tmp_path)
    for file in (tmp_path / "out").glob("*.py"):
        imported = [
            line.split()[1].split(".")[0] for line in file.read_text().splitlines() if line.startswith(("import ", "from "))
        ]
        assert set(imported) <= {"math", "typing", "torch", "transformers", ""}, file.name


def test_every_setting_of_the_model_is_known_to_the_export() -> None:
    """A setting that is added to the schema has to be computed by the modelling file, or be listed as one of training only."""
    for name, value in tiny_model().model_dump().items():
        if isinstance(value, dict):
            assert not value.keys() - set(COMPUTED[name]), f"model.{name}: teach modeling_megascale.py, then list them"
        else:
            assert name in COMPUTED[""], name


def test_a_setting_that_the_modelling_file_does_not_compute_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPUTED, "altup", ("blocks",))
    with pytest.raises(InputError, match="model.altup.read: predicted cannot be exported"):
        export(random_decoder(tiny_model(**COMPOSITIONS["K = 2, same block, predicted"])), tmp_path)
