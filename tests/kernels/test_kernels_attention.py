"""Packed attention with prefixes: equal to one softmax by definition, for every shape, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.kernels.attention import PrefixMaths, attention, attention_reference, merge_prefixes
from megascale.kernels.flash import flash_forward, math_backward
from megascale.kernels.merge import merge_by_lse
from tiny import largest_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Lengths of the documents, P streams, G key/value heads, H/G queries each, D, n (0: no prefix), window; q, k, v of all streams or one
    for all of them.
    """

    lengths: tuple[int, ...]
    streams: int = 1
    groups: int = 1
    queries: int = 1
    width: int = 8
    slots: int = 0
    window: int | None = None
    shared: bool = False

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
        """q, k, v and, with slots, prefix_k and prefix_v, which need gradients; and the borders."""
        generator = torch.Generator().manual_seed(seed)
        tokens, heads = sum(self.lengths), self.groups * (1 if self.shared else self.streams)
        shapes = [(tokens, heads * self.queries, self.width)] + [(tokens, heads, self.width)] * 2
        shapes += [(self.streams, self.groups, self.slots, self.width)] * 2 if self.slots else []
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
        return tensors, torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    def call(self, function, tensors: list[Tensor], borders: Tensor) -> Tensor:
        """attention or its reference."""
        return function(*tensors[:3], borders, max(self.lengths), self.window, *tensors[3:])


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple),
    streams=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    width=st.sampled_from([2, 8, 16]),
    slots=st.integers(1, 9),
    window=st.one_of(st.none(), st.integers(1, 14)),
    shared=st.booleans(),
)
plain_cases = st.builds(
    Case,
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple),
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    width=st.sampled_from([2, 8, 16]),
    window=st.one_of(st.none(), st.integers(1, 14)),
)
FULL = Case((5, 3, 3, 1, 9), streams=2, groups=2, queries=2, width=8, slots=4, window=4)
SHARED = replace(FULL, shared=True)


def value_and_gradients(function, case: Case, dtype: torch.dtype) -> list[Tensor]:
    tensors, borders = case.inputs(dtype)
    out = case.call(function, tensors, borders)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


@contextmanager
def prefixes_as_maths(compiled: bool) -> Iterator[None]:
    """What compiled runs do on CPUs, with or without the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixMaths, "merge", staticmethod(merge_prefixes))
        patch.setattr(PrefixMaths, "gradients", staticmethod(math_backward))
        if compiled:
            PrefixMaths.compile()
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25)
@given(case=cases | plain_cases, maths=st.booleans())
def test_output_and_all_gradients_are_those_of_one_softmax(dtype: torch.dtype, case: Case, maths: bool) -> None:
    with prefixes_as_maths(False) if maths else nullcontext():
        found = value_and_gradients(attention, case, dtype)
    # the truth of bf16 inputs is their fp64 result
    tensors, borders = case.inputs(dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out = case.call(attention_reference, wide, borders)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).double()
    expected = [out.detach(), *torch.autograd.grad((out * weights).sum(), wide)]
    for got, true in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == true.shape
        scale = max(true.abs().max().item(), 1.0)  # a gradient may be zero (one visible key)
        assert (got.double() - true).abs().max().item() <= TOLERANCE[dtype] * scale


@settings(max_examples=10)
@given(case=cases)
def test_what_all_streams_share_is_what_each_of_them_would_have(case: Case) -> None:
    shared = replace(case, shared=True)
    tensors, borders = shared.inputs(torch.float64)
    copies = [x.detach().repeat(1, case.streams, 1).requires_grad_() for x in tensors[:3]]
    found, expected = (shared.call(attention, list(x), borders) for x in (tensors, [*copies, *tensors[3:]]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    grads = torch.autograd.grad((found * weights).sum(), tensors)
    of_copies = torch.autograd.grad((expected * weights).sum(), [*copies, *tensors[3:]])
    summed = [x.unflatten(1, (case.streams, -1)).sum(1) for x in of_copies[:3]]
    for got, true in zip(grads, [*summed, *of_copies[3:]], strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_the_reference_is_sdpa_with_a_mask() -> None:
    case = Case((6, 4), groups=2, queries=2)
    tensors, borders = case.inputs(torch.float64)
    mask = torch.block_diag(torch.ones(6, 6), torch.ones(4, 4)).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in tensors), attn_mask=mask, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(case.call(attention_reference, tensors, borders), expected)


def test_tokens_know_nothing_of_other_documents() -> None:
    case = Case((5, 7, 4), groups=2, queries=2, slots=3, streams=2)
    tensors, borders = case.inputs(torch.float32)
    before = case.call(attention, tensors, borders)
    changed = [x.detach().clone() for x in tensors]
    for x in changed[:3]:
        x[5:12] = 1e4
    after = case.call(attention, changed, borders)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[12:], after[12:])
    alone = Case((5,), groups=2, queries=2, slots=3, streams=2)
    small = [x[:5] for x in tensors[:3]] + tensors[3:]
    torch.testing.assert_close(alone.call(attention, small, torch.tensor([0, 5], dtype=torch.int32)), before[:5])


def test_gradients_stay_inside_the_document() -> None:
    case = Case((5, 7, 4), slots=3)
    tensors, borders = case.inputs(torch.float32)
    case.call(attention, tensors, borders)[5:12].sum().backward()
    for x in tensors[:3]:
        assert x.grad is not None
        assert not x.grad[:5].any()
        assert not x.grad[12:].any()
        assert x.grad[5:12].any()


def test_streams_see_only_their_own_prefix() -> None:
    case = Case((6,), streams=3, groups=1, queries=2, slots=2)
    tensors, borders = case.inputs(torch.float32)
    before = case.call(attention, tensors, borders)
    changed = [x.detach().clone() for x in tensors]
    changed[3][1] += 3
    changed[4][1] -= 3
    after = case.call(attention, changed, borders)
    same = [bool(torch.equal(before[:, 2 * p : 2 * p + 2], after[:, 2 * p : 2 * p + 2])) for p in range(3)]
    assert same == [True, False, True]


def test_prefixes_with_scores_far_below_all_others_are_as_none() -> None:
    case = Case((6, 3), groups=1, queries=2, slots=4)
    tensors, borders = case.inputs(torch.float32)
    with torch.no_grad():
        tensors[0][..., 0] = 1.0
        tensors[3].zero_()
        tensors[3][..., 0] = -1e6
    plain = Case((6, 3), groups=1, queries=2)
    assert torch.equal(case.call(attention, tensors, borders), plain.call(attention, tensors[:3], borders))


def test_a_window_as_long_as_the_documents_changes_nothing_and_prefixes_stay_visible() -> None:
    full, wide = Case((6, 3), slots=2), Case((6, 3), slots=2, window=6)
    tensors, borders = full.inputs(torch.float32)
    assert torch.equal(full.call(attention, tensors, borders), wide.call(attention, tensors, borders))
    one = Case((6, 3), slots=2, window=1)
    out = one.call(attention, tensors, borders)
    out[5].sum().backward()
    k_grad, prefix_grad = tensors[1].grad, tensors[4].grad
    assert k_grad is not None and prefix_grad is not None
    assert k_grad[5].any() and not k_grad[:5].any() and prefix_grad.any()


def test_inputs_need_not_be_contiguous() -> None:
    tensors, borders = FULL.inputs(torch.float32)
    expected = value_and_gradients(attention, FULL, torch.float32)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    out = FULL.call(attention, strided, borders)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    found = [out, *torch.autograd.grad((out * weights).sum(), strided)]
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [FULL, SHARED], ids=["prefix", "shared"])
def test_repetition_gives_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    first, second = (value_and_gradients(attention, case, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool) -> None:
    case = Case((3, 2), streams=2, groups=1, queries=2, width=2, slots=2, window=2, shared=shared)
    tensors, borders = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: case.call(attention, list(x), borders), tensors)


@pytest.mark.parametrize("case", [FULL, SHARED, Case((4, 4, 2), groups=2, queries=2)], ids=["prefix", "shared", "plain"])
def test_the_operators_are_registered_correctly(case: Case) -> None:
    tensors, borders = case.inputs(torch.float32)
    prefixes = tensors[3:] or [None, None]
    arguments = (*tensors[:3], *prefixes, None, None, None, borders, max(case.lengths), case.window or 0)
    torch.library.opcheck(torch.ops.megascale.attention.default, arguments)


def with_context(case: Case, here: tuple[int, int], tensors: list[Tensor], borders: Tensor) -> Tensor:
    """Attention of the tokens [first, last) alone, which see what their first document has before them as a context."""
    first, last = here
    edges = borders.tolist()
    before = max(edge for edge in edges if edge <= first)
    after = min(edge for edge in edges if edge > first)
    inner = [edge - first for edge in edges if first < edge < last]
    local = torch.tensor([0, *inner, last - first], dtype=torch.int32)
    spans = torch.tensor([[0, min(after, last) - first, before, first], [0, 0, 0, 0]])
    q, k, v, *prefixes = tensors
    part = slice(first, last)
    context = (k, v, spans)
    return attention(q[part], k[part], v[part], local, max(case.lengths), None, *(prefixes or [None, None]), context=context)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25)
@given(case=cases | plain_cases, cut=st.floats(0.05, 0.95))
def test_tokens_with_a_context_have_what_they_have_in_the_whole(dtype: torch.dtype, case: Case, cut: float) -> None:
    """As on two context-parallel ranks: their parts together are the whole, and so are the sums of their gradients."""
    case = replace(case, window=None)
    tensors, borders = case.inputs(dtype)
    middle = max(1, int(sum(case.lengths) * cut))
    halves = [half for half in ((0, middle), (middle, sum(case.lengths))) if half[0] < half[1]]
    found = torch.cat([with_context(case, half, tensors, borders) for half in halves])
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = case.call(attention_reference, wide, borders)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad((found * weights).sum(), tensors)
    true = torch.autograd.grad((expected * weights.double()).sum(), wide)
    for got, wanted in zip([found, *grads], [expected, *true], strict=True):
        assert (got.double() - wanted).abs().max().item() <= TOLERANCE[dtype] * max(wanted.abs().max().item(), 1.0)


@pytest.mark.parametrize("shared", [False, True])
def test_the_operator_with_a_context_is_registered_correctly(shared: bool) -> None:
    case = Case((5, 6), streams=2, groups=1, queries=2, slots=2, shared=shared)
    tensors, borders = case.inputs(torch.float32)
    keys, values = (x.detach().clone().requires_grad_() for x in tensors[1:3])
    spans = torch.tensor([[0, 5, 2, 7], [0, 0, 0, 0]])
    arguments = (*tensors, keys, values, spans, borders, 6, 0)
    torch.library.opcheck(torch.ops.megascale.attention.default, arguments)


@pytest.mark.parametrize("case", [FULL, SHARED], ids=["prefix", "shared"])
def test_a_compiled_graph_is_whole_and_equal(case: Case) -> None:
    torch._dynamo.reset()
    expected = value_and_gradients(attention, case, torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = value_and_gradients(compiled, case, torch.float32)
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got, true)


def test_compiled_prefixes_are_equal_in_every_layer() -> None:
    """Layers of other head counts one after the other: what is compiled for one is not stretched to the next."""
    torch._dynamo.reset()
    layers = [Case((12, 12), streams=2, groups=2, queries=2, slots=4, shared=shared) for shared in (False, True)]
    with prefixes_as_maths(False):
        expected = [value_and_gradients(attention, layer, torch.bfloat16) for layer in layers]
    with prefixes_as_maths(True):
        found = [value_and_gradients(attention, layer, torch.bfloat16) for layer in layers]
    for got, true in zip(chain(*found), chain(*expected), strict=True):
        torch.testing.assert_close(got, true, rtol=0.02, atol=0.03)


pairs = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))


@settings(max_examples=30)
@given(sizes=pairs)
def test_merging_two_key_sets_is_attention_over_both(sizes: tuple[int, int, int, int]) -> None:
    queries, first, second, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (queries, first + second, first + second)
    )
    parts = [flash_forward(q, k[:, :, s], v[:, :, s], False) for s in (slice(0, first), slice(first, None))]
    out, lse = merge_by_lse(*parts[0], *parts[1])
    whole_out, whole_lse = flash_forward(q, k, v, False)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)
    swapped, _ = merge_by_lse(*parts[1], *parts[0])
    torch.testing.assert_close(swapped, out)


def test_merging_with_an_empty_part_changes_nothing() -> None:
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged, merged_lse = merge_by_lse(out, lse, torch.randn(3, 4), torch.full((3,), -float("inf")))
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_largest_error_is_not_blind() -> None:
    assert largest_error(torch.ones(2), torch.tensor([1.0, 1.1])) > 0.05
