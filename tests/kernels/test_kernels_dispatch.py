"""Copies of rows sorted by expert, and their sums: by definition, as operators, and the same in PyTorch and as custom operators."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.kernels.dispatch import (
    combine_copies,
    copy_rows,
    sort_copies,
    sum_copies,
    take_rows,
    take_rows_or_zeros,
)

both = pytest.mark.parametrize("fused", [False, True], ids=["plain", "operator"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """Choices of E experts by N rows of width d; E stands for none."""

    experts: Tensor
    count: int
    width: int = 8

    @property
    def dropped(self) -> bool:
        return bool((self.experts == self.count).any())

    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        return sort_copies(self.experts, self.count, False)

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """rows [N, d], outputs [M, d] with NaN behind the last expert's, gates [N, k] (fp32 or wider)."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(len(self.experts), self.width, generator=generator, dtype=torch.float64)
        outputs = torch.randn(self.experts.numel(), self.width, generator=generator, dtype=torch.float64)
        gates = torch.rand(self.experts.shape, generator=generator, dtype=torch.float64)
        outputs[int((self.experts < self.count).sum()) :] = torch.nan
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return rows.to(dtype).requires_grad_(), outputs.to(dtype).requires_grad_(), gates.to(wide).requires_grad_()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count, k, number = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(0, 70))
    least = draw(st.sampled_from([0, 0, count - 1]))  # also all copies to one expert, or nowhere
    chosen = torch.randint(least, count + draw(st.booleans()), (number, k), generator=torch.Generator().manual_seed(number))
    return Case(chosen, count, draw(st.sampled_from([1, 5, 8])))


def case(dropped: bool = True, width: int = 8, number: int = 9) -> Case:
    generator = torch.Generator().manual_seed(3)
    return Case(torch.randint(0, 4 + dropped, (number, 3), generator=generator), 4, width)


def weigh(out: Tensor) -> Tensor:
    """A scalar whose gradient differs in every element."""
    return (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)).sum()


@both
@settings(max_examples=60)
@given(case=cases())
def test_sorting_is_by_expert_then_by_token(fused: bool, case: Case) -> None:
    order, place, counts = sort_copies(case.experts, case.count, fused)
    flat = case.experts.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert order.tolist() == expected
    for copy, at in enumerate(place.flatten().tolist()):
        assert at == (len(flat) if flat[copy] == case.count else expected.index(copy))
    assert counts.tolist() == [flat.count(e) for e in range(case.count)]
    assert {order.dtype, place.dtype, counts.dtype} == {torch.int64}


@both
@settings(max_examples=40)
@given(case=cases())
def test_copies_and_gated_sums_are_what_they_say(fused: bool, case: Case) -> None:
    order, place, _ = case.sorted()
    rows, outputs, gates = case.inputs()
    copies = copy_rows(rows, order, place, case.dropped, fused)
    summed = combine_copies(outputs, gates, order, place, case.dropped, fused)
    live = place.flatten()[place.flatten() < order.numel()]
    factors = torch.linspace(-1, 1, copies.numel(), dtype=torch.float64).view(copies.shape)
    behind = torch.zeros(len(copies), 1, dtype=torch.bool).index_fill(0, live, True).logical_not()
    copies_grad = torch.autograd.grad(copies, rows, torch.where(behind, torch.nan, factors))[0]
    outputs_grad, gates_grad = torch.autograd.grad(weigh(summed), (outputs, gates))
    out_factors = torch.linspace(-1, 1, summed.numel(), dtype=torch.float64).view(summed.shape)
    for n in range(len(rows)):
        expected_sum, expected_grad = torch.zeros(case.width).double(), torch.zeros(case.width).double()
        for c, at in enumerate(place[n].tolist()):
            if at == order.numel():
                assert gates_grad[n, c] == 0
                continue
            assert torch.equal(copies[at], rows[n])
            expected_grad += factors[at]
            expected_sum += gates[n, c] * outputs[at]
            torch.testing.assert_close(outputs_grad[at], gates[n, c] * out_factors[n])
            torch.testing.assert_close(gates_grad[n, c], outputs[at] @ out_factors[n])
        torch.testing.assert_close(copies_grad[n], expected_grad)
        torch.testing.assert_close(summed[n], expected_sum)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_operators_are_the_plain_form(dtype: torch.dtype, dropped: bool) -> None:
    example = case(dropped)
    order, place, _ = example.sorted()
    live = (torch.arange(order.numel()) < (place < order.numel()).sum())[:, None]
    results = []
    for fused in (False, True):
        rows, outputs, gates = example.inputs(dtype)
        copies = torch.where(live, copy_rows(rows, order, place, dropped, fused), 0)
        summed = combine_copies(outputs, gates, order, place, dropped, fused)
        gradients = torch.autograd.grad(weigh(copies) + weigh(summed), (rows, outputs, gates))
        results.append([copies, summed, gradients[0], torch.where(live, gradients[1], 0), gradients[2]])
    for plain, operator in zip(*results, strict=True):
        assert plain.dtype == operator.dtype
        assert (plain.double() - operator.double()).abs().max() <= TOLERANCE[dtype] * plain.double().abs().max()
    assert torch.equal(results[0][0], results[1][0])


def test_ungated_sums_are_gated_ones_with_gates_of_one() -> None:
    example = case()
    order, place, _ = example.sorted()
    _, outputs, gates = example.inputs()
    found = sum_copies(outputs, place)
    expected = combine_copies(outputs, torch.ones_like(gates), order, place, True, True)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(weigh(out), outputs)[0] for out in (found, expected)))


@both
def test_taking_rows_is_indexing_with_its_gradient(fused: bool) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 3, 1, 1, 0, 2, 3])
    places = torch.stack([(index == row).nonzero().flatten() for row in range(4)])
    torch.testing.assert_close(take_rows(x, index, places, fused=fused), x[index])
    assert torch.autograd.gradcheck(lambda y: take_rows(y, index, places, fused=fused), x)


@both
def test_rows_may_be_left_out(fused: bool) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    index, places = torch.tensor([2, 0, 2]), torch.tensor([[1, 3], [3, 3], [2, 0]])
    torch.testing.assert_close(take_rows(x, index, places, True, fused), x[index])
    assert torch.autograd.gradcheck(lambda y: take_rows(y, index, places, True, fused), x)


@both
@pytest.mark.parametrize("rows", [0, 3])
def test_zeros_may_be_taken(rows: int, fused: bool) -> None:
    x = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 3, 0, 3, 0]) if rows else torch.zeros(5, dtype=torch.int64)
    places = torch.tensor([[2, 4], [5, 5], [0, 5]])[:rows]
    expected = torch.cat([x, torch.zeros(1, 2)])[index]
    assert torch.equal(take_rows_or_zeros(x, index, places, fused), expected)
    if rows:
        assert torch.autograd.gradcheck(lambda y: take_rows_or_zeros(y, index, places, fused), x)


@both
@pytest.mark.parametrize("dropped", [False, True])
def test_gradcheck(fused: bool, dropped: bool) -> None:
    example = case(dropped, width=3, number=5)
    order, place, _ = example.sorted()
    live = (torch.arange(order.numel()) < (place < order.numel()).sum())[:, None]
    rows, outputs, gates = example.inputs()
    outputs = outputs.detach().nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.where(live, copy_rows(x, order, place, dropped, fused), 0), rows)
    assert torch.autograd.gradcheck(
        lambda y, g: combine_copies(torch.where(live, y, 0), g, order, place, dropped, fused), (outputs, gates)
    )


def test_a_compiled_router_gives_the_same_places() -> None:
    """torch.compile has read places before they were written, beside something else that is scattered."""

    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        experts = (x @ weight).softmax(-1).topk(2, -1)[1]
        chosen = torch.zeros(x.shape[0], 4).scatter_(-1, experts, 1.0)
        return *sort_copies(experts, 4, False), chosen.sum(0)

    torch._dynamo.reset()
    inputs = torch.randn(128, 32), torch.randn(32, 4)
    for found, expected in zip(torch.compile(route)(*inputs), route(*inputs), strict=True):
        assert torch.equal(found, expected)


def test_the_operators_are_registered_correctly() -> None:
    example = case(dropped=False)
    order, place, _ = example.sorted()
    rows, outputs, gates = example.inputs(torch.float32)
    ops = torch.ops.megascale
    torch.library.opcheck(ops.sort_copies.default, (example.experts, 4, True))
    torch.library.opcheck(ops.write_copies.default, (rows, place, order.numel()))
    torch.library.opcheck(ops.sum_copies.default, (outputs, place))
    torch.library.opcheck(ops.weighted_sum.default, (outputs, gates, place))
    torch.library.opcheck(ops.weighted_sum_backward.default, (rows.detach(), outputs.detach(), gates.detach(), place))
    torch.library.opcheck(ops.take_rows_or_zeros.default, (rows, order // 3, place))


def dispatch_and_combine(fused: bool, experts: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
    order, place, _ = sort_copies(experts, 4, fused)
    return combine_copies(copy_rows(rows, order, place, True, fused).square(), gates, order, place, True, fused)


def value_and_gradients(function, example: Case, rows: Tensor, gates: Tensor) -> list[Tensor]:
    out = function(example.experts, rows, gates)
    return [out.detach(), *torch.autograd.grad(weigh(out), (rows, gates))]


@both
def test_compiled_checkpointed_strided_and_repeated_it_gives_the_same_bits(fused: bool) -> None:
    torch._dynamo.reset()
    example = case()
    rows, _, gates = example.inputs(torch.float32)

    def function(*inputs: Tensor) -> Tensor:
        return dispatch_and_combine(fused, *inputs)

    expected = value_and_gradients(function, example, rows, gates)
    strided = [x.detach().t().contiguous().t().requires_grad_() for x in (rows, gates)]
    others = [
        value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), example, rows, gates),
        value_and_gradients(lambda *inputs: checkpoint(function, *inputs, use_reentrant=False), example, rows, gates),
        value_and_gradients(function, example, *strided),
        value_and_gradients(function, example, rows, gates),
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
