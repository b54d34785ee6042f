"""The stream aggregation: one operator, plain PyTorch and the paper's formula agree, forward and backward, wherever it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from aggregation import NAMES, Case, defined, exact, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.kernels.aggregate import aggregate_streams, linear_aggregate_streams

FORMS = pytest.mark.parametrize("fused", [True, False], ids=["one operator", "plain"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    streams = draw(st.integers(1, 8))
    first = draw(st.integers(0, streams - 1))
    here, sizes = draw(st.integers(1, streams - first)), st.integers(1, 12)
    eps, used = draw(st.sampled_from([0.0, 0.01, 0.1, 0.9])), draw(st.booleans())
    return Case(draw(st.integers(1, 9)), streams, draw(sizes), draw(sizes), first, here, eps, used)


def hidden_of(x: Tensor, weight: Tensor) -> Tensor:
    return x.flatten(1) @ weight.t()


def linear_inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, mix_weight, mix_bias."""
    x, _, *others = case.inputs(dtype)
    draw = torch.Generator().manual_seed(11)
    weight = torch.randn(case.inner, case.streams * case.width, generator=draw, dtype=torch.float64) * case.width**-0.5
    return [x, weight.to(dtype).requires_grad_(), *others]


def assert_near(found: list[Tensor], true: list[Tensor], tolerance: float) -> None:
    for name, got, right in zip(NAMES, found, true, strict=True):
        assert (got.double() - right).abs().max() <= tolerance * max(right.abs().max().item(), 1), name


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25)
@given(case=cases())
def test_it_is_what_the_formula_says(fused: bool, dtype: torch.dtype, case: Case) -> None:
    inputs, upstream = case.inputs(dtype), case.upstream(dtype)
    outputs = aggregate_streams(*inputs, case.smoothing, case.first, fused=fused)
    assert [out.dtype for out in outputs] == [dtype, torch.promote_types(dtype, torch.float32)]
    found, true = with_gradients(outputs, inputs, upstream), exact(case, inputs, upstream)
    assert_near(found, true, TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 1))


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [Case(), Case(7, 1, 5, 3), Case(4, 8, 3, 12, weights_used=False)], ids=str)
def test_with_the_first_product_in_it_it_is_the_same(fused: bool, dtype: torch.dtype, case: Case) -> None:
    inputs, upstream = linear_inputs(case, dtype), case.upstream(dtype)
    found = with_gradients(linear_aggregate_streams(*inputs, case.smoothing, fused=fused), inputs, upstream)
    x, weight, *others = wide = [one.detach().double().requires_grad_() for one in inputs]
    upstream = tuple(None if grad is None else grad.double() for grad in upstream)
    true = with_gradients(defined(x, hidden_of(x, weight), *others, case), wide, upstream)
    assert [one.dtype for one in found[2:]] == [dtype] * 5
    assert_near(found, true, TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 1))


def test_in_bf16_it_is_nearer_than_plain_pytorch() -> None:
    """The gradient of x, in particular, which is rounded twice here, before the GEMM accumulates on it and behind that, and three times
    in plain PyTorch. Sums of terms that cancel may be off by as much as they are in plain PyTorch, one way or the other.
    """
    case = Case(64, 4, 128, 128, weights_used=False)
    inputs, upstream = linear_inputs(case, torch.bfloat16), case.upstream(torch.bfloat16)
    true_inputs = [one.detach().double().requires_grad_() for one in inputs]
    true_upstream = upstream[0].double(), None
    true = with_gradients(linear_aggregate_streams(*true_inputs, 0.1, fused=False), true_inputs, true_upstream)
    one, plain = (
        with_gradients(linear_aggregate_streams(*inputs, 0.1, fused=fused), inputs, upstream) for fused in (True, False)
    )
    for name, found, other, right in zip(NAMES, one, plain, true, strict=True):
        error, plain_error = (found.double() - right).norm(), (other.double() - right).norm()
        assert error <= (1 if name in ("y", "weights", "grad x") else 2) * plain_error, name


def test_gradcheck() -> None:
    case = Case(3, 3, 2, 2, first=1, here=2)
    inputs = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: aggregate_streams(*tensors, 0.1, 1, fused=True), inputs)
    inputs = linear_inputs(Case(3, 2, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: linear_aggregate_streams(*tensors, 0.1, fused=True), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_registered_correctly(dtype: torch.dtype) -> None:
    case = Case(first=1, here=2)
    torch.library.opcheck(torch.ops.megascale.aggregate.default, (*case.inputs(dtype), 0.1, 1))
    torch.library.opcheck(torch.ops.megascale.linear_aggregate.default, (*linear_inputs(Case(), dtype), 0.1))


def used(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Both forms in one graph."""
    x, weight, *others = inputs
    first = linear_aggregate_streams(*inputs, case.smoothing, fused=True)
    return *first, *aggregate_streams(x, hidden_of(x, weight), *others, case.smoothing, fused=True)


def test_a_compiled_graph_is_whole_and_equal() -> None:
    torch._dynamo.reset()
    case = Case()
    inputs = linear_inputs(case, torch.float32)
    compiled = torch.compile(used, fullgraph=True, backend="aot_eager")
    found, expected = (
        [*out, *torch.autograd.grad(sum(o.square().sum() for o in out), inputs)]
        for out in (compiled(case, inputs), used(case, inputs))
    )
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


def test_recomputed_it_is_the_same() -> None:
    case = Case()
    inputs = linear_inputs(case, torch.float32)
    again = checkpoint(used, case, inputs, use_reentrant=False)
    found, expected = (torch.autograd.grad(sum(o.square().sum() for o in out), inputs) for out in (again, used(case, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@FORMS
def test_inputs_need_not_be_contiguous(fused: bool) -> None:
    case = Case(6, 3, 4, 4)
    x, *others = linear_inputs(case, torch.float32)
    stream_major = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    upstream = tuple(None if grad is None else grad.t().contiguous().t() for grad in case.upstream(torch.float32))
    found, expected = (
        with_gradients(linear_aggregate_streams(*tensors, 0.1, fused=fused), tensors, upstream)
        for tensors in ([stream_major, *others], [x, *others])
    )
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


def test_a_loss_of_the_weights_alone_has_gradients() -> None:
    case = Case()
    for function, inputs in (
        (aggregate_streams, case.inputs(torch.float64)),
        (linear_aggregate_streams, linear_inputs(case, torch.float64)),
    ):
        entropies = [-(w * w.log()).sum() for w in (function(*inputs, 0.1, fused=fused)[1] for fused in (True, False))]
        found, expected = (torch.autograd.grad(entropy, inputs[1:]) for entropy in entropies)
        for got, right in zip(found, expected, strict=True):
            torch.testing.assert_close(got, right)


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, *others = linear_inputs(Case(), torch.float32)
    y, _ = linear_aggregate_streams(x, weight.requires_grad_(False), *others, 0.1, fused=True)
    y.sum().backward()
    assert weight.grad is None and x.grad is not None and all(one.grad is not None for one in others)


@FORMS
def test_without_tokens_there_is_nothing(fused: bool) -> None:
    inputs = linear_inputs(Case(0), torch.float32)
    y, weights = linear_aggregate_streams(*inputs, 0.1, fused=fused)
    (y.sum() + weights.sum()).backward()
    assert y.shape == (0, 6) and weights.shape == (0, 3)
    assert not any(one.grad.any() for one in inputs)


def test_little_is_kept_for_the_backward_pass() -> None:
    """x, the hidden layer's result and the softmax; parameters are there anyway."""
    case = Case(64, 4, 32, 32)
    inputs = linear_inputs(case, torch.bfloat16)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        linear_aggregate_streams(*inputs, 0.1, fused=True)
    held = {one.data_ptr() for one in inputs}
    sizes = sorted(one.numel() * one.element_size() for pointer, one in kept.items() if pointer not in held)
    assert sizes == [64 * 4 * 4, 64 * 32 * 2]


def test_on_a_cpu_the_plain_form_is_the_default() -> None:
    inputs = linear_inputs(Case(4, 2, 16, 16), torch.bfloat16)
    default, plain = (linear_aggregate_streams(*inputs, 0.1, fused=fused) for fused in (None, False))
    one_by_one = F.linear(F.silu(F.linear(inputs[0].flatten(1), inputs[1]) + inputs[2]), *inputs[3:]).float().softmax(-1)
    assert all(torch.equal(a, b) for a, b in zip(default, plain, strict=True))
    assert torch.equal(default[1], one_by_one * 0.9 + 0.05)
