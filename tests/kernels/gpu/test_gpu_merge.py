"""The Triton kernel that merges two parts of attention by their log-sum-exps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megascale.kernels.attention import attention, attention_reference
from megascale.kernels.merge import merge_by_lse, streams_first
from megascale.kernels.merge_triton import merge

Parts = list[Tensor]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


def parts(
    tokens: int, streams: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, shared: bool = False
) -> Parts:
    """out, lse of all streams or of one for all of them, and those of other keys; log-sum-exps differ by tens."""
    draw = torch.Generator().manual_seed(tokens)
    here = heads if shared else streams * heads
    shapes = (tokens, here, width), (tokens, here), (streams, heads, tokens, width), (streams, heads, tokens)
    wide = torch.promote_types(dtype, torch.float32)
    return [
        (torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(device, kind)
        for shape, scale, kind in zip(shapes, (1, 9, 1, 9), (dtype, wide) * 2, strict=True)
    ]


def expected(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, on the CPU."""
    out, lse, more, more_lse = (x.detach().cpu().double() for x in (out, lse, more, more_lse))
    streams, heads, tokens, width = more.shape
    merged, merged_lse = merge_by_lse(*(streams_first(x, out.shape[1] // heads) for x in (out, lse)), more, more_lse)
    return merged.movedim(2, 0).reshape(tokens, streams * heads, width), merged_lse.movedim(2, 0).reshape(tokens, -1)


SHAPES = [(1, 1, 1, 8), (7, 3, 2, 64), (33, 2, 3, 40), (5, 4, 1, 256), (130, 1, 5, 17)]


@pytest.mark.parametrize("shared", [False, True], ids=["each stream its own", "one for all streams"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_the_formula_says(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, shared: bool, device: torch.device
) -> None:
    tokens, streams, heads, width = shape
    given = parts(tokens, streams, heads, width, dtype, device, shared)
    true, true_lse = expected(*given)
    found, lse = merge(*given)
    assert found.dtype == dtype and found.shape == (tokens, streams * heads, width)
    assert (found.cpu().double() - true).abs().max() <= tolerance * true.abs().max()
    assert (lse.cpu().double() - true_lse).abs().max() <= max(1e-6, tolerance**2) * true_lse.abs().max()


def test_it_takes_parts_as_flash_kernels_lay_them_out_and_repeats_its_bits(device: torch.device) -> None:
    out, lse, more, more_lse = parts(9, 2, 3, 16, torch.float32, device)
    by_token = more.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    lse_by_head = lse.t().contiguous().t()
    first, second = merge(out.clone(), lse, more, more_lse), merge(out.clone(), lse_by_head, by_token, more_lse)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_where_both_have_the_same_streams_the_first_is_overwritten(device: torch.device) -> None:
    given = parts(9, 2, 3, 16, torch.float32, device)
    assert merge(*given)[0].data_ptr() == given[0].data_ptr()


def test_a_part_that_sees_nothing_adds_nothing(device: torch.device) -> None:
    out, lse, more, more_lse = parts(6, 2, 2, 8, torch.float32, device)
    merged, merged_lse = merge(out.clone(), lse, more, torch.full_like(more_lse, -float("inf")))
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_without_tokens_there_is_nothing(device: torch.device) -> None:
    merged, lse = merge(*parts(0, 2, 3, 16, torch.float32, device))
    assert merged.shape == (0, 6, 16) and lse.shape == (0, 6)


@pytest.mark.parametrize("shared", [False, True], ids=["each stream its own", "one for all streams"])
def test_attention_with_prefixes_runs_it(shared: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # in the interpreter too
    draw = torch.Generator().manual_seed(0)
    heads = 2 if shared else 6
    shapes = [(9, heads, 16)] * 3 + [(3, 2, 5, 16)] * 2
    q, k, v, prefix_k, prefix_v = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
    borders = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    merged: list[object] = []
    monkeypatch.setattr("megascale.kernels.merge_triton.merge", lambda *a: merged.append(a) or merge(*a))
    found, true = (function(q, k, v, borders, 5, None, prefix_k, prefix_v) for function in (attention, attention_reference))
    assert len(merged) == 1
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
