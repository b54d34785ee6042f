"""The Triton kernels of the stream aggregation: right for every shape and type, blind to what is not theirs, the same bits each time."""

from __future__ import annotations

import pytest
import torch
from aggregation import NAMES, Case, Upstream, exact, with_gradients
from torch import Tensor

from megascale.kernels.aggregate import aggregate_streams, linear_aggregate_streams
from megascale.kernels.aggregate_triton import backward_hidden, backward_streams, forward

CASES = [
    Case(tokens=1, streams=1, width=1, inner=1),
    Case(tokens=7, streams=2, width=128, inner=256, weights_used=False),
    Case(tokens=33, streams=3, width=130, inner=67, smoothing=0.0),
    Case(tokens=70, streams=4, width=48, inner=160),
    Case(tokens=16, streams=5, width=300, inner=129, smoothing=0.9, weights_used=False),
    Case(tokens=17, streams=8, width=96, inner=80),
    Case(tokens=9, streams=4, width=40, inner=24, first=2, here=2, weights_used=False),
    Case(tokens=20, streams=8, width=129, inner=31, first=5, here=1),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def run(case: Case, inputs: list[Tensor], upstream: Upstream) -> list[Tensor]:
    """The kernels on the same terms as `exact`."""
    x, hidden, hidden_bias, mix_weight, mix_bias = (x.detach() for x in inputs)
    y, weights, shares = forward(x, hidden, hidden_bias, mix_weight, mix_bias, case.smoothing, case.first)
    grad_x, grad_scores = backward_streams(upstream[0], upstream[1], x, shares, case.smoothing, case.first)
    return [y, weights, grad_x, *backward_hidden(grad_scores, hidden, hidden_bias, mix_weight), grad_scores.sum(0)]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-9)], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_what_the_formula_says(case: Case, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """To a rounding of the result and, where terms cancel, twice the error of plain PyTorch in the same type (flash-attention's rule)."""
    inputs, upstream = case.inputs(dtype, device), case.upstream(dtype, device)
    plain = with_gradients(aggregate_streams(*inputs, case.smoothing, case.first, fused=False), inputs, upstream)
    for name, found, other, true in zip(NAMES, run(case, inputs, upstream), plain, exact(case, inputs, upstream), strict=True):
        assert found.dtype == other.dtype or name == "grad mix bias"  # which is rounded later
        allowed = tolerance * true.norm() + 2 * (other.cpu().double() - true).norm()
        assert (found.cpu().double() - true).norm() <= allowed, name


def test_rows_may_lie_apart_and_nothing_between_them_is_read(device: torch.device) -> None:
    case = Case(tokens=19, streams=3, width=40, inner=24)
    inputs, upstream = case.inputs(torch.float32, device), case.upstream(torch.float32, device)
    expected = run(case, inputs, upstream)
    apart = [torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), device=device) for x in inputs[:2]]
    apart = [wide[..., : x.shape[-1]].copy_(x) for wide, x in zip(apart, inputs, strict=False)]
    columns_first = tuple(None if grad is None else grad.t().contiguous().t() for grad in upstream)
    apart += [torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2] for x in inputs[2:]]
    for grads in (upstream, columns_first):
        assert all(torch.equal(a, b) for a, b in zip(run(case, apart, grads), expected, strict=True))


def test_streams_may_come_before_tokens(device: torch.device) -> None:
    case = Case(tokens=6, streams=4, width=16, inner=16)
    x, *others = case.inputs(torch.float32, device)
    upstream = case.upstream(torch.float32, device)
    stream_major = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    found, expected = run(case, [stream_major, *others], upstream), run(case, [x, *others], upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_tokens_there_is_nothing_and_weights_get_zeros(device: torch.device) -> None:
    case = Case(tokens=0, streams=2, width=16, inner=16)
    found = run(case, case.inputs(torch.float32, device), case.upstream(torch.float32, device))
    assert [x.shape[0] for x in found[:4]] == [0] * 4
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found[4:])


def test_far_out_scores_are_no_problem(device: torch.device) -> None:
    """exp of them would overflow."""
    case = Case(tokens=4, streams=2, width=16, inner=16)
    x, hidden, hidden_bias, mix_weight, mix_bias = case.inputs(torch.float32, device)
    mix_bias = torch.tensor([300.0, -300.0], device=device)
    found = run(case, [x, hidden * 100, hidden_bias, mix_weight, mix_bias], case.upstream(torch.float32, device))
    torch.testing.assert_close(found[1], torch.tensor([0.95, 0.05], device=device).expand(4, 2))
    assert all(part.isfinite().all() for part in found)


def test_repetition_gives_the_same_bits(device: torch.device) -> None:
    case = Case(tokens=75, streams=4, width=64, inner=64)
    inputs, upstream = case.inputs(torch.bfloat16, device), case.upstream(torch.bfloat16, device)
    first, second = (run(case, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("apart", ["tokens", "streams"])
def test_rows_may_begin_beyond_32_bits(apart: str, device: torch.device) -> None:
    """Offsets wrap at 2^31 where they are not 64 bits wide; the memory between the rows is reserved, never touched."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 12 GiB for its strides")
    case = Case(tokens=17, streams=4, width=16, inner=16)
    x, hidden, *others = case.inputs(torch.bfloat16, device)
    upstream, step = case.upstream(torch.bfloat16, device), 2**31 // 16 + 16
    strides = (step, 16, 1) if apart == "tokens" else (16, 6 * step, 1)
    far_x = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=device).copy_(x.detach())
    far_hidden = torch.empty_strided(hidden.shape, (step, 1), dtype=x.dtype, device=device).copy_(hidden.detach())
    found, expected = run(case, [far_x, far_hidden, *others], upstream), run(case, [x, hidden, *others], upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_operators_run_these_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # in the interpreter too
    case = Case(tokens=20, streams=3, width=32, inner=48, first=1, here=2)
    inputs, upstream = case.inputs(torch.float32, device), case.upstream(torch.float32, device)
    found = with_gradients(aggregate_streams(*inputs, case.smoothing, case.first), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, run(case, inputs, upstream), strict=True))


def test_with_the_first_product_in_it_the_gradient_of_x_has_both_parts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    case = Case(tokens=20, streams=3, width=32, inner=48)
    x, _, *others = case.inputs(torch.float64, device)
    weight = torch.linspace(-1, 1, 48 * 96, dtype=torch.float64, device=device).sin().view(48, 96).requires_grad_()
    inputs, upstream = [x, weight, *others], case.upstream(torch.float64, device)
    found, expected = (
        with_gradients(linear_aggregate_streams(*inputs, case.smoothing, fused=fused), inputs, upstream)
        for fused in (None, False)
    )
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0], expected[0])  # which would be the plain form
