"""AltUp's passes: predict and correct by definition, in plain PyTorch and as custom operators that do the same."""

from __future__ import annotations

from collections.abc import Callable

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megascale.kernels.altup import altup_mix, altup_predict, altup_split

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "operator"])
READS = pytest.mark.parametrize("predicted", [False, True], ids=["old", "predicted"])
COEFFICIENTS = pytest.mark.parametrize("by_token", [False, True], ids=["static", "by token"])
shapes = st.tuples(st.integers(0, 7), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
"""T, P, K, d"""


def mix_results(inputs: Inputs, fused: bool) -> list[Tensor]:
    return value_and_gradients(altup_mix, *inputs.tensors, inputs.computed, inputs.predicted, fused)


def predict_results(inputs: Inputs, fused: bool) -> list[Tensor]:
    return value_and_gradients(altup_predict, inputs.state, inputs.row, inputs.computed, fused)


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for got, true in zip(found, expected, strict=True):
        assert got.shape == true.shape
        assert (got.double() - true).norm() <= tolerance * max(float(true.norm()), 1)


@FUSED
@settings(max_examples=40)
@given(size=shapes, by_token=st.booleans(), predicted=st.booleans(), shared=st.booleans())
def test_they_are_algorithm_1(
    fused: bool, size: tuple[int, int, int, int], by_token: bool, predicted: bool, shared: bool
) -> None:
    inputs = altup_inputs(*size, by_token=by_token, predicted=predicted, shared=shared)
    expected = value_and_gradients(mix_by_definition, *inputs.tensors, inputs.computed, predicted)
    assert_near(mix_results(inputs, fused), expected)
    expected = value_and_gradients(predict_by_definition, inputs.state, inputs.row, inputs.computed)
    assert_near(predict_results(inputs, fused), expected)


@FUSED
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_results_have_the_precision_of_what_they_belong_to(dtype: torch.dtype, tolerance: float, fused: bool) -> None:
    inputs = altup_inputs(5, 2, 3, 8, dtype)
    found = mix_results(inputs, fused)
    assert [x.dtype for x in found] == [dtype, dtype, dtype, torch.float32, torch.float32]
    wide = inputs.map(Tensor.double)
    assert_near(found, value_and_gradients(mix_by_definition, *wide.tensors, 2, False), tolerance)


@COEFFICIENTS
@READS
def test_the_operators_give_the_bits_of_the_plain_form(predicted: bool, by_token: bool) -> None:
    inputs = altup_inputs(5, 2, 3, 8, torch.bfloat16, by_token, predicted)
    for results in (mix_results, predict_results):
        assert all(torch.equal(a, b) for a, b in zip(results(inputs, False), results(inputs, True), strict=True))


@FUSED
@COEFFICIENTS
@READS
def test_gradcheck(predicted: bool, by_token: bool, fused: bool) -> None:
    inputs = altup_inputs(2, 2, 2, 3, by_token=by_token, predicted=predicted, shared=True).leaves()

    def layer(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
        block, whole = altup_split(state, 1, fused)
        if predicted:
            block = altup_predict(whole, predict[..., 1, :], 1, fused)
        return altup_mix(whole, update * block, predict, correct, 1, predicted, fused)

    assert torch.autograd.gradcheck(layer, inputs.tensors)


@COEFFICIENTS
def test_the_operators_are_registered_correctly(by_token: bool) -> None:
    inputs = altup_inputs(4, 2, 3, 8, torch.float32, by_token).leaves()
    torch.library.opcheck(torch.ops.megascale.altup_mix.default, (*inputs.tensors, 1, False))
    torch.library.opcheck(torch.ops.megascale.altup_predict.default, (inputs.state, inputs.row.detach(), 1))
    plain = inputs.map(Tensor.detach)
    torch.library.opcheck(torch.ops.megascale.altup_mix_backward.default, (plain.state, *plain.tensors, 1, True))
    torch.library.opcheck(torch.ops.megascale.altup_predict_backward.default, (plain.update, plain.state, plain.row, 1))
    torch.library.opcheck(torch.ops.megascale.altup_add_to_block.default, (plain.state, plain.update, 1))


def layer_of(inputs: Inputs, fused: bool) -> Callable[..., Tensor]:
    """A layer around what it does to one block."""

    def layer(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
        block, whole = altup_split(state, inputs.computed, fused)
        if inputs.predicted:
            block = altup_predict(whole, predict[..., inputs.computed, :], inputs.computed, fused)
        return altup_mix(whole, (block + update).sin(), predict, correct, inputs.computed, inputs.predicted, fused)

    return layer


def layer_by_definition(inputs: Inputs) -> Callable[..., Tensor]:
    def layer(state: Tensor, update: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
        block = state[:, :, inputs.computed]
        if inputs.predicted:
            block = predict_by_definition(state, predict[..., inputs.computed, :], inputs.computed)
        changed = (block + update).sin()
        return mix_by_definition(state, changed, predict, correct, inputs.computed, inputs.predicted)

    return layer


@FUSED
@COEFFICIENTS
@READS
def test_what_a_layer_reads_and_what_it_mixes_have_one_gradient(predicted: bool, by_token: bool, fused: bool) -> None:
    for shared in (False, True):
        inputs = altup_inputs(4, 2, 3, 8, by_token=by_token, predicted=predicted, shared=shared)
        found, expected = (
            value_and_gradients(layer, *inputs.tensors) for layer in (layer_of(inputs, fused), layer_by_definition(inputs))
        )
        assert_near(found, expected)


@FUSED
def test_either_part_may_go_without_a_gradient(fused: bool) -> None:
    inputs = altup_inputs(4, 2, 3, 8).leaves()
    block, _ = altup_split(inputs.state, 1, fused)
    (grad,) = torch.autograd.grad(block.sum(), inputs.state)
    assert torch.equal(grad, torch.tensor([0.0, 1, 0]).double()[:, None].expand_as(grad))
    _, whole = altup_split(inputs.state, 1, fused)
    assert torch.equal(torch.autograd.grad(whole.sum(), inputs.state)[0], torch.ones_like(inputs.state))


def test_splitting_copies_nothing() -> None:
    state = altup_inputs(4, 2, 3, 8).state
    block, whole = altup_split(state, 1)
    assert whole.data_ptr() == state.data_ptr()
    assert block.data_ptr() == state[:, :, 1].data_ptr()


@FUSED
@COEFFICIENTS
@READS
def test_a_compiled_graph_is_whole_and_equal(predicted: bool, by_token: bool, fused: bool) -> None:
    torch._dynamo.reset()
    inputs = altup_inputs(4, 2, 3, 8, torch.float32, by_token, predicted)
    layer = layer_of(inputs, fused)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = (value_and_gradients(function, *inputs.tensors) for function in (compiled, layer))
    assert_near(found, [x.double() for x in expected], 1e-6)


@FUSED
def test_a_recomputed_layer_has_the_same_gradients_to_the_bit(fused: bool) -> None:
    inputs = altup_inputs(4, 2, 3, 8, torch.float32, predicted=True)
    layer = layer_of(inputs, fused)

    def recomputed(*tensors: Tensor) -> Tensor:
        return checkpoint(layer, *tensors, use_reentrant=False)

    results = [value_and_gradients(function, *inputs.tensors) for function in (layer, recomputed)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FUSED
def test_only_the_inputs_are_saved(fused: bool) -> None:
    inputs = altup_inputs(4, 2, 3, 8, by_token=True).leaves()
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        whole = altup_split(inputs.state, 1, fused)[1]
        altup_mix(whole, inputs.update, inputs.predict, inputs.correct, 1, False, fused)
    assert sorted(saved) == sorted(x.untyped_storage().data_ptr() for x in inputs.tensors)


@FUSED
@COEFFICIENTS
def test_inputs_need_not_be_contiguous_and_repetition_gives_the_same_bits(by_token: bool, fused: bool) -> None:
    inputs = altup_inputs(4, 2, 3, 8, torch.float32, by_token)
    strided = inputs.map(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
    runs = [mix_results(x, fused) + predict_results(x, fused) for x in (inputs, inputs, strided)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert_near(runs[2], [x.double() for x in runs[0]], 1e-6)
    out, grad = altup_mix(*inputs.tensors, 2, False, fused), factors_like(inputs.update)[:, :, None].expand(-1, -1, 3, -1)
    backward = torch.ops.megascale.altup_mix_backward
    dense = backward(grad.contiguous(), *strided.tensors, 2, False)
    for one, other in zip(backward(grad, *inputs.tensors, 2, False), dense, strict=True):
        torch.testing.assert_close(one, other)
        assert one.is_contiguous()
        assert other.is_contiguous()
    assert out.is_contiguous()
