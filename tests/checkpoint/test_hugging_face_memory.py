"""Conversion reads and writes one tensor at a time, and needs no transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreign import CASES
from megascale.checkpoint.hugging_face.families import LLAMA
from megascale.checkpoint.hugging_face.settings import read_model
from megascale.checkpoint.hugging_face.tensors import pieces_of
from runs import environment

ROOT = Path(__file__).parents[2]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


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
    config = {"model_type": "llama", "vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 16, "max_position_embeddings": 64}
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
