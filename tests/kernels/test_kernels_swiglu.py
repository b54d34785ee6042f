"""SwiGLU as an operator, and with each row's gate: by definition, as operators, and rows without an expert left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.kernels.dispatch import sort_copies
from megascale.kernels.swiglu import swiglu, weighted_swiglu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def inputs(number: int, k: int, width: int, dtype: torch.dtype = torch.float64, count: int = 4) -> list[Tensor]:
    """gate, up [M, f] (NaN behind the last expert's rows), weights [N, k], order, ends; some choices have no expert."""
    generator = torch.Generator().manual_seed(number)
    experts = torch.randint(0, count + 1, (number, k), generator=generator)
    order, _, counts = sort_copies(experts, count)
    gate, up = torch.randn(2, number * k, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(number, k, generator=generator, dtype=torch.float64)
    ends = counts.cumsum(0).to(torch.int32)
    gate[ends[-1] :] = up[ends[-1] :] = torch.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [gate.to(dtype), up.to(dtype), weights.to(wide)]
    return [*(x.requires_grad_() for x in leaves), order, ends]


def factors(out: Tensor, end: Tensor) -> Tensor:
    """A gradient that differs in every element, NaN from the row `end` on."""
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.where((torch.arange(len(out)) < end)[:, None], grad, torch.nan).to(out.dtype)


def value_and_gradients(function, arguments: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of gate, up and weights, up to the last row that has an expert."""
    out, end = function(*arguments), arguments[4][-1]
    gradients = torch.autograd.grad(out, arguments[:3], factors(out, end), allow_unused=True)
    return [out.detach()[:end], gradients[0][:end], gradients[1][:end], *gradients[2:]]


def by_definition(gate: Tensor, up: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    end = ends[-1]
    hidden = gate[:end].sigmoid() * gate[:end] * up[:end] * weights.flatten()[order[:end], None]
    return torch.cat([hidden, torch.zeros_like(gate[end:])])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25)
@given(number=st.integers(1, 20), k=st.integers(1, 4), width=st.sampled_from([1, 5, 16]))
def test_it_is_its_definition(dtype: torch.dtype, number: int, k: int, width: int) -> None:
    arguments = inputs(number, k, width, dtype)
    wide = [x.detach().double().requires_grad_() for x in arguments[:3]] + arguments[3:]
    found, expected = value_and_gradients(weighted_swiglu, arguments), value_and_gradients(by_definition, wide)
    for got, true in zip(found, expected, strict=True):
        assert (got.double() - true).abs().max() <= TOLERANCE[dtype] * true.abs().max() if true.numel() else got.numel() == 0
    assert [x.dtype for x in found] == [dtype] * 3 + [arguments[2].dtype]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "operator"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_weights_it_is_silu_times_up(dtype: torch.dtype, fused: bool) -> None:
    gate, up = (torch.randn(7, 5).to(dtype).requires_grad_() for _ in range(2))
    out = swiglu(gate, up, fused)
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    true = F.silu(wide[0]) * wide[1]
    end = torch.tensor(7)
    found = [out, *torch.autograd.grad(out, (gate, up), factors(out, end))]
    expected = [true, *torch.autograd.grad(true, wide, factors(out, end).double())]
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


def test_gradcheck() -> None:
    gate, up, weights, order, ends = inputs(4, 2, 3)
    end = int(ends[-1])
    gate, up = (x.detach()[:end].requires_grad_() for x in (gate, up))
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, True), (gate, up))
    _, place, _ = sort_copies(torch.zeros(4, 2, dtype=torch.int64), 1)  # every choice has an expert
    order, ends = place.flatten().flip(0), torch.tensor([3, 8], dtype=torch.int32)
    gate, up = (torch.randn(8, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *leaves: weighted_swiglu(*leaves, order, ends), (gate, up, weights))


def test_the_operators_are_registered_correctly() -> None:
    gate, up, weights, order, ends = inputs(6, 2, 4, torch.float32)
    gate, up = (x.detach().nan_to_num().requires_grad_() for x in (gate, up))
    ops = torch.ops.megascale
    torch.library.opcheck(ops.swiglu.default, (gate, up))
    torch.library.opcheck(ops.weighted_swiglu.default, (gate, up, weights, order, ends))
    plain = [x.detach() for x in (gate, up, weights)]
    torch.library.opcheck(ops.swiglu_backward.default, (plain[0], *plain[:2]))
    torch.library.opcheck(ops.weighted_swiglu_backward.default, (plain[0], *plain, order, ends))


def test_compiled_checkpointed_strided_and_repeated_it_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    arguments = inputs(9, 2, 8, torch.float32)
    expected = value_and_gradients(weighted_swiglu, arguments)
    strided = [x.detach().t().contiguous().t().requires_grad_() for x in arguments[:3]] + arguments[3:]
    others = [
        value_and_gradients(torch.compile(weighted_swiglu, fullgraph=True, backend="aot_eager"), arguments),
        value_and_gradients(lambda *all: checkpoint(weighted_swiglu, *all, use_reentrant=False), arguments),
        value_and_gradients(weighted_swiglu, strided),
        value_and_gradients(weighted_swiglu, arguments),
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
