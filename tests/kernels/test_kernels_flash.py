"""Which flash kernels attention runs on, and that those of a GPU are called as torch declares them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import attention as torch_attention

from megascale.kernels import attention, flash
from megascale.kernels.flash import choose_flash, has_flash

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU that is only talked about: `gpu(major, *installed modules)`; the names that were activated."""
    activated: list[str] = []

    def make(major: int, *installed: str) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(flash, "_is_installed", lambda module: module in installed)
        monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activated.append)
        return activated

    return make


@pytest.mark.parametrize(
    ("major", "installed", "activated", "said"),
    [
        (8, ("flash_attn_interface", "flash_attn.cute.interface"), [], "FlashAttention 2 in torch"),
        (9, ("flash_attn_interface",), ["FA3"], "FA3 (flash_attn_interface)"),
        (9, (), [], "FlashAttention 2 in torch; faster on sm_90 would be flash_attn_interface"),
        (10, ("flash_attn.cute.interface",), ["FA4"], "FA4 (flash_attn.cute.interface)"),
        (10, ("flash_attn_interface",), [], "FlashAttention 2 in torch; faster on sm_100 would be flash_attn.cute.interface"),
    ],
)
def test_the_fastest_kernels_that_are_installed_are_used_and_named(gpu, major: int, installed, activated, said: str) -> None:
    found = gpu(major, *installed)
    assert choose_flash(CUDA, torch.bfloat16, 128) == said
    assert found == activated


def test_wider_heads_than_the_fastest_takes_stay_on_torchs_own(gpu) -> None:
    found = gpu(10, "flash_attn.cute.interface")
    said = choose_flash(CUDA, torch.bfloat16, 192)
    assert said == "FlashAttention 2 in torch; faster on sm_100 would be FA4, for heads of at most 128"
    assert found == []


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 20), (torch.bfloat16, 512)])
def test_what_no_flash_kernel_takes_is_said(gpu, dtype: torch.dtype, width: int) -> None:
    assert gpu(9, "flash_attn_interface") == []
    assert choose_flash(CUDA, dtype, width).startswith("plain maths: ")


def test_a_cpu_has_its_own() -> None:
    assert choose_flash(torch.device("cpu"), torch.float32, 7) == "torch's flash kernel for CPUs"
    assert not has_flash(torch.zeros(1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize(("context", "window"), [(False, 0), (False, 5), (True, 0)])
def test_a_gpus_kernels_are_called_as_torch_declares_them(
    monkeypatch: pytest.MonkeyPatch, prefixes: bool, context: bool, window: int
) -> None:
    """On tensors without values: the shapes are those that the operators promise."""
    monkeypatch.setattr(attention, "has_flash", lambda q: True)
    monkeypatch.setattr(flash, "has_flash", lambda q: True)
    streams, heads, groups, tokens, width = 2, 4, 2, 48, 16

    def some(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    q, k = some(tokens, streams * heads, width), some(tokens, streams * groups, width)
    prefix = some(streams, groups, 6, width) if prefixes else None
    keys, spans = (some(32, streams * groups, width), torch.tensor([[0, 20, 0, 32]])) if context else (None, None)
    borders = torch.empty(4, dtype=torch.int32, device="meta")
    inputs = (q, k, k, prefix, prefix, keys, keys, spans)
    out, lse = attention._attention._init_fn(*inputs, borders, 20, window)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
    grads = attention._attention_backward._init_fn(out, *inputs, out, lse, borders, 20, window)
    wanted = [x for x in (q, k, k, prefix, prefix, keys, keys) if x is not None]
    assert [(x.shape, x.dtype) for x in grads if x.numel()] == [(x.shape, x.dtype) for x in wanted]
