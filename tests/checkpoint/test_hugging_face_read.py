"""Rectangles of our tensors out of Hugging Face files, and a digest of weights that does not depend on what holds them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from foreign import CASES
from megascale.checkpoint.hugging_face.folder import open_hugging_face
from megascale.checkpoint.hugging_face.import_folder import import_folder
from megascale.checkpoint.hugging_face.read import HuggingFaceTensors
from megascale.checkpoint.layout import region
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.tensors import weights_digest


@pytest.mark.parametrize("kind", ["Llama", "tied Llama", "Qwen2", "Mixtral", "Qwen3-MoE, every second layer, k = 1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_rectangle_is_that_of_the_whole_tensor(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    CASES[kind].save(tmp_path / "hf", dtype)
    import_folder(tmp_path / "hf", tmp_path / "run")
    tensors, choices = HuggingFaceTensors(open_hugging_face(tmp_path / "hf")), random.Random(1)
    with CheckpointReader(tmp_path / "run/checkpoints/step-00000000") as reader:
        assert tensors.names() == reader.names()
        for name in tensors.names():
            whole = reader.read(name)
            assert torch.equal(tensors.read(name), whole)
            assert tensors.shape(name) == tuple(whole.shape)
            for _ in range(5):
                offsets = tuple(choices.randrange(extent) for extent in whole.shape)
                sizes = tuple(choices.randint(1, extent - first) for extent, first in zip(whole.shape, offsets, strict=True))
                found = tensors.read(name, offsets, sizes)
                assert torch.equal(found, whole[region(offsets, sizes)]) and found.dtype == torch.float32
        assert weights_digest(tensors, tensors.names()) == weights_digest(reader, reader.names())
        assert reader.state["start"]["digest"] == weights_digest(reader, reader.names())


def test_the_digest_sees_every_value_name_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        path = tmp_path

        def __init__(self, **tensors: torch.Tensor):
            self.tensors = tensors

        def names(self) -> list[str]:
            return sorted(self.tensors)

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.tensors[name].shape)

        def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
            return self.tensors[name][region(offsets, sizes)]

    def digest(**tensors: torch.Tensor) -> str:
        return weights_digest(Held(**tensors), list(tensors))

    a = torch.arange(12.0).view(4, 3)
    changed = a.clone()
    changed[3, 2] += 1e-3
    others = [digest(a=changed), digest(b=a), digest(a=a.view(3, 4)), digest(a=a, b=a), digest(a=torch.tensor(1.0))]
    assert len({digest(a=a), *others}) == 6
    assert digest(a=a, b=changed) == digest(b=changed, a=a)
    assert digest(a=a.bfloat16()) == digest(a=a)
    whole = digest(a=a)
    monkeypatch.setattr("megascale.checkpoint.tensors.BLOCK", 4)
    assert digest(a=a) == whole
