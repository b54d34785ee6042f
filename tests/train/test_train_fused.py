"""Which parts run on Triton kernels, and what the log says of it."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megascale.config.errors import InputError
from megascale.kernels.fused import is_fused
from megascale.model.altup import AltUpResidual
from megascale.model.streams import Aggregator
from megascale.train.fused import use_kernels
from tiny import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Part(nn.Module):
    """Has kernels."""

    def __init__(self, fused: bool | None = None):
        super().__init__()
        self.fused = fused


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(Part(), nn.Linear(1, 1), nn.Sequential(Part(False)))


def decided(model: nn.Sequential, choice, device: torch.device) -> tuple[list[bool | None], str]:
    said = use_kernels([model], choice, device)
    return [part.fused for part in model.modules() if isinstance(part, Part)], said


def test_a_cpu_has_plain_pytorch(model: nn.Sequential) -> None:
    assert decided(model, "auto", CPU) == ([False, False], "plain PyTorch (the Triton ones are for GPUs)")


def test_a_gpu_may_have_it_too(model: nn.Sequential) -> None:
    assert decided(model, "plain", CUDA) == ([False, False], "plain PyTorch (kernels=plain)")


def test_on_a_gpu_every_part_with_kernels_uses_them(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    assert decided(model, "auto", CUDA) == ([None, None], "triton 3.6.0 (Part)")


def test_a_part_whose_shape_has_no_kernel_is_named_with_the_reason(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    many = Aggregator(32, 9, 0.1)
    said = use_kernels([nn.Sequential(model, many)], "auto", CUDA)
    assert said == "triton 3.6.0 (Part); Aggregator is plain PyTorch: more than 8 streams"
    assert not is_fused(torch.zeros(1), many.fused, not many.why_plain)
    few = AltUpResidual(tiny_model(width=24, altup={"blocks": 2}), 0)
    assert use_kernels([few], "auto", CUDA).endswith("AltUpResidual is plain PyTorch: a width that is no multiple of 16")
    assert use_kernels([Aggregator(32, 8, 0.1)], "auto", CUDA) == "triton 3.6.0 (Aggregator)"


def test_a_gpu_without_triton_is_refused_with_the_way_out(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"(?s)triton is not installed.*kernels=plain"):
        decided(model, "auto", CUDA)
