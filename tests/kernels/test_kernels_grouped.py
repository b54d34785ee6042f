"""The expert GEMM: each row meets its own expert and nothing else."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.kernels.grouped import grouped_linear, grouped_linear_reference

Counts = tuple[int, ...]


def inputs(counts: Counts, dtype: torch.dtype = torch.float32, spare: int = 0, width: int = 16, outputs: int = 8) -> list[Tensor]:
    """x of the experts' rows and some spare ones, weight, ends."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts) + spare, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), outputs, width, generator=generator).to(dtype).requires_grad_()
    return [x, weight, torch.tensor(list(accumulate(counts)), dtype=torch.int32)]


def value_and_gradients(function, x: Tensor, weight: Tensor, ends: Tensor) -> list[Tensor]:
    out = function(x, weight, ends)
    factors = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * factors).sum(), (x, weight))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@settings(max_examples=25)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum).map(tuple))
def test_it_is_a_loop_over_experts(dtype: torch.dtype, tolerance: float, counts: Counts) -> None:
    arguments = inputs(counts, dtype)
    found = value_and_gradients(grouped_linear, *arguments)
    wide = [x.detach().double().requires_grad_() for x in arguments[:2]]
    expected = value_and_gradients(grouped_linear_reference, wide[0], wide[1], arguments[2])
    for got, true in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - true).abs().max() <= tolerance * max(true.abs().max().item(), 1)


@pytest.mark.parametrize("counts", [(0, 7, 0), (7, 0, 0), (0, 0, 7)])
def test_all_rows_may_go_to_one_expert_and_idle_ones_get_no_gradient(counts: Counts) -> None:
    x, weight, ends = inputs(counts)
    busy = counts.index(7)
    out, _, grad_weight = value_and_gradients(grouped_linear, x, weight, ends)
    torch.testing.assert_close(out, x @ weight[busy].t())
    assert [bool(grad_weight[e].any()) for e in range(3)] == [e == busy for e in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_without_rows_gives_its_weights_no_gradient(dtype: torch.dtype) -> None:
    x, weight, ends = inputs((0, 0), dtype)
    out = grouped_linear(x, weight, ends)
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight))  # its gradient has strides of 0
    assert (out.shape, grad_x.shape) == ((0, 8), (0, 16))
    assert not grad_weight.any()


def test_rows_behind_the_last_end_are_never_read() -> None:
    counts = (3, 0, 5)
    clean_x, weight, ends = inputs(counts)
    clean = value_and_gradients(grouped_linear, clean_x, weight, ends)
    poisoned = torch.cat([clean_x.detach(), torch.full((4, 16), float("nan"))]).requires_grad_()
    out = grouped_linear(poisoned, weight, ends)
    torch.testing.assert_close(out[:8], clean[0])
    factors = torch.linspace(-1, 1, 64).view(8, 8)
    grad_out = torch.cat([factors, torch.full((4, 8), float("nan"))])
    grad_x, grad_weight = torch.autograd.grad(out, (poisoned, weight), grad_out)
    torch.testing.assert_close(grad_x[:8], clean[1])
    torch.testing.assert_close(grad_weight, clean[2])


@pytest.mark.parametrize("counts", [(130, 0, 300, 1, 77), (5, 400, 90), (128, 256), (3, 2, 200)])
@pytest.mark.parametrize("spare", [0, 40])
def test_on_a_cpu_gemms_of_multiples_of_rows_leak_nothing(counts: Counts, spare: int) -> None:
    """In bf16 an expert's GEMM goes on into rows of the next one; rows behind the last end hold NaN."""
    x, weight, ends = inputs(counts, torch.bfloat16, spare)
    used = sum(counts)
    x = torch.cat([x.detach()[:used], torch.full((spare, 16), float("nan"), dtype=x.dtype)]).requires_grad_()
    factors = torch.linspace(-1, 1, used * 8).view(used, 8).bfloat16()
    grad_out = torch.cat([factors, torch.full((spare, 8), float("nan"), dtype=x.dtype)])
    out = grouped_linear(x, weight, ends)
    found = [out.detach()[:used], *torch.autograd.grad(out, (x, weight), grad_out)]
    wide = [value.detach().double().requires_grad_() for value in (x[:used], weight)]
    true_out = grouped_linear_reference(wide[0], wide[1], ends)
    expected = [true_out.detach(), *torch.autograd.grad(true_out, wide, factors.double())]
    for got, true in zip((found[0], found[1][:used], found[2]), expected, strict=True):
        assert (got.double() - true).abs().max() <= 2e-2 * true.abs().max()


def test_gradcheck() -> None:
    x, weight, ends = inputs((2, 0, 3), torch.float64, width=3, outputs=2)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, ends), (x, weight))


def test_the_operators_are_registered_correctly() -> None:
    x, weight, ends = inputs((2, 0, 6))
    torch.library.opcheck(torch.ops.megascale.grouped_linear.default, (x, weight, ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_graph_is_whole_and_equal(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    arguments = inputs((3, 0, 5), dtype)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    found, expected = (value_and_gradients(function, *arguments) for function in (compiled, grouped_linear))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_need_not_be_contiguous_and_repetition_gives_the_same_bits() -> None:
    x, weight, ends = inputs((3, 0, 5))
    strided = x.detach().t().contiguous().t().requires_grad_()
    runs = [value_and_gradients(grouped_linear, rows, weight, ends) for rows in (x, x, strided)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
