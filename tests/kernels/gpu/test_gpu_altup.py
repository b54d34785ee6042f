"""AltUp's Triton kernels against the definition in fp64: values, gradients, strides, nothing read or left that should not be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from altup_cases import (
    Inputs,
    altup_inputs,
    factors_like,
    mix_by_definition,
    predict_by_definition,
    value_and_gradients,
)
from torch import Tensor

from megascale.kernels import altup, altup_triton

SIZES = {
    "K=2, several tiles": (1, 2, 2, 528),
    "K=3, odd": (2, 1, 3, 37),
    "K=4": (1, 2, 4, 512),
    "K=8": (1, 1, 8, 64),
}
READS = pytest.mark.parametrize("predicted", [False, True], ids=["old", "predicted"])
COEFFICIENTS = pytest.mark.parametrize("by_token", [False, True], ids=["static", "by token"])


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated is not a number until a kernel writes it."""
    empty = Tensor.new_empty

    def poisoned(self, *arguments, **options):
        return empty(self, *arguments, **options).fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def mix_results(inputs: Inputs, grad: Tensor | None = None) -> list[Tensor]:
    out = altup_triton.mix(*inputs.tensors, inputs.computed, inputs.predicted)
    grad = factors_like(out) if grad is None else grad
    return [out, *altup_triton.mix_backward(grad, *inputs.tensors, inputs.computed, inputs.predicted)]


def predict_results(inputs: Inputs) -> list[Tensor]:
    out = altup_triton.predict(inputs.state, inputs.row, inputs.computed)
    return [out, *altup_triton.predict_backward(factors_like(out), inputs.state, inputs.row, inputs.computed)]


def true_mix(inputs: Inputs) -> list[Tensor]:
    wide = inputs.map(Tensor.double)
    return value_and_gradients(mix_by_definition, *wide.tensors, wide.computed, wide.predicted)


def true_predict(inputs: Inputs) -> list[Tensor]:
    wide = inputs.map(Tensor.double)
    return value_and_gradients(predict_by_definition, wide.state, wide.row, wide.computed)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    """Beside the result's own size, by that of a sum of as many random signs as there are products in the largest sum."""
    products = expected[0].numel() ** 0.5 if expected[0].numel() else 0
    for got, true in zip(found, expected, strict=True):
        assert got.shape == true.shape
        assert (got.double() - true).norm() <= tolerance * (true.norm() + products)


@COEFFICIENTS
@READS
@pytest.mark.parametrize("size", SIZES)
def test_mix_is_algorithm_1(size: str, predicted: bool, by_token: bool, device: torch.device) -> None:
    inputs = altup_inputs(*SIZES[size], torch.float64, by_token, predicted, device=device)
    assert_close(mix_results(inputs), true_mix(inputs))


@COEFFICIENTS
@pytest.mark.parametrize("size", SIZES)
def test_predict_is_a_row_of_the_prediction(size: str, by_token: bool, device: torch.device) -> None:
    inputs = altup_inputs(*SIZES[size], torch.float64, by_token, device=device)
    assert_close(predict_results(inputs), true_predict(inputs))


@COEFFICIENTS
@pytest.mark.parametrize("size", ["K=2, several tiles", "K=3, odd"])
def test_in_fp32_too(size: str, by_token: bool, device: torch.device) -> None:
    inputs = altup_inputs(*SIZES[size], torch.float32, by_token, device=device)
    assert_close(mix_results(inputs) + predict_results(inputs), true_mix(inputs) + true_predict(inputs), 1e-6)


@COEFFICIENTS
@READS
@pytest.mark.parametrize("size", ["K=2, several tiles", "K=3, odd"])
def test_in_bf16_the_kernels_are_as_near_to_the_truth_as_plain_maths(
    size: str, predicted: bool, by_token: bool, device: torch.device
) -> None:
    inputs = altup_inputs(*SIZES[size], torch.bfloat16, by_token, predicted, device=device)
    found, expected = mix_results(inputs) + predict_results(inputs), true_mix(inputs) + true_predict(inputs)
    plain = value_and_gradients(altup._Mix.apply, *inputs.tensors, inputs.computed, inputs.predicted)
    plain += value_and_gradients(altup._Predict.apply, inputs.state, inputs.row, inputs.computed)
    for got, usual, true in zip(found, plain, expected, strict=True):
        assert got.dtype == usual.dtype
        rounding = torch.finfo(got.dtype).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= 2 * (usual.double() - true).abs().max() + rounding


@COEFFICIENTS
@READS
def test_blocks_that_all_streams_share_get_the_sum_of_their_gradients(
    predicted: bool, by_token: bool, device: torch.device
) -> None:
    inputs = altup_inputs(2, 3, 2, 48, by_token=by_token, predicted=predicted, shared=True, device=device)
    assert_close(mix_results(inputs), true_mix(inputs))
    assert_close(predict_results(inputs), true_predict(inputs))


def test_expanded_blocks_and_gradients_are_read_without_a_copy(device: torch.device) -> None:
    """Before the first layer every block is the embedding; behind the last, every block gets the gradient of their sum."""
    inputs = altup_inputs(2, 2, 3, 48, device=device)
    expanded = inputs.map(lambda x: x[:, :1, :1].expand(-1, 2, 3, -1) if x.ndim == 4 else x)
    dense = expanded.map(Tensor.contiguous)
    grad = factors_like(inputs.update)[:, :, None].expand(-1, -1, 3, -1)
    assert expanded.state.stride()[1:3] == grad.stride()[2:3] * 2 == (0, 0)
    for one, other in zip(mix_results(expanded, grad), mix_results(dense, grad.contiguous()), strict=True):
        assert torch.equal(one, other)


@COEFFICIENTS
def test_strides_are_followed_and_nothing_between_the_rows_is_read(by_token: bool, device: torch.device) -> None:
    inputs = altup_inputs(2, 2, 2, 37, torch.float32, by_token, device=device)

    def inside(x: Tensor) -> Tensor:
        """The same numbers inside a larger tensor of nothing."""
        larger = x.new_full([n + 3 for n in x.shape], float("nan"))
        view = larger[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)

    strided, grad = inputs.map(inside), factors_like(altup_triton.mix(*inputs.tensors, inputs.computed, False))
    transposed = inputs.map(lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x)
    for other, other_grad in ((strided, inside(grad)), (transposed, grad.mT.contiguous().mT)):
        for one, two in zip(mix_results(inputs, grad), mix_results(other, other_grad), strict=True):
            assert torch.equal(one, two)
        for one, two in zip(predict_results(inputs), predict_results(other), strict=True):
            assert torch.equal(one, two)


@COEFFICIENTS
@pytest.mark.parametrize("tokens, streams, width", [(0, 2, 32), (3, 2, 0)])
def test_nothing_in_is_nothing_out(tokens: int, streams: int, width: int, by_token: bool, device: torch.device) -> None:
    inputs = altup_inputs(tokens, streams, 2, width, by_token=by_token, device=device)
    assert_close(mix_results(inputs), true_mix(inputs), 0)
    assert_close(predict_results(inputs), true_predict(inputs), 0)


@COEFFICIENTS
def test_repetition_gives_the_same_bits(by_token: bool, device: torch.device) -> None:
    inputs = altup_inputs(3, 1, 2, 64, torch.float32, by_token, device=device)
    results = [mix_results(inputs) + predict_results(inputs) for _ in range(2)]
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


@READS
def test_programs_share_the_tiles(predicted: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more tiles than programs."""
    monkeypatch.setattr(altup_triton, "PROGRAMS", 1)
    inputs = altup_inputs(2, 2, 2, 96, predicted=predicted, device=device)
    assert altup_triton._cut(inputs.state, 4).programs < altup_triton._cut(inputs.state, 4).everything
    assert_close(mix_results(inputs), true_mix(inputs))
    assert_close(predict_results(inputs), true_predict(inputs))


@pytest.mark.parametrize("strides", [(2**30, 1, 16, 1), (16, 1, 2**30, 1)], ids=["tokens", "blocks"])
def test_offsets_may_pass_31_bits(strides: tuple[int, int, int, int], device: torch.device) -> None:
    """Three tokens or blocks 2^30 elements apart, of a storage that is never touched between them."""
    inputs = altup_inputs(3, 1, 3, 16, torch.bfloat16, device=device)
    storage = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=device)
    moved = replace(inputs, state=storage.as_strided((3, 1, 3, 16), strides).copy_(inputs.state))
    near = mix_results(inputs, inputs.state) + predict_results(inputs)
    far = mix_results(moved, moved.state) + predict_results(moved)
    assert all(itertools.starmap(torch.equal, zip(near, far, strict=True)))
