"""Routed experts against a loop over tokens, with and without a capacity, for every router."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.schema import Model
from megascale.kernels.grouped import grouped_linear
from megascale.model.layers import SwiGLU
from megascale.model.origin import Origin
from megascale.model.routers import ROUTERS
from megascale.model.routing import Experts
from tiny import origin, tiny_model

every_router = pytest.mark.parametrize("router", ROUTERS)


def routed(streams: int = 1, dtype: torch.dtype = torch.float64, **experts: Any) -> tuple[Model, Experts]:
    model = tiny_model(streams={"count": streams}, experts={"count": 4, "width": 16, **experts})
    torch.manual_seed(0)
    layer = Experts(model).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.router.start(0, 0)
    return model, layer


def tokens(number: int = 9, streams: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, streams, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def one_expert(layer: Experts, e: int, x: Tensor) -> Tensor:
    return layer.down[e] @ (F.silu(layer.gate[e] @ x) * (layer.up[e] @ x))


def use_kernels(layer: Experts, kernels: str | None) -> None:
    """Let the custom operators compute, as on a GPU; rows that may travel get their gates where they are back."""
    layer.fused = kernels is not None
    if kernels == "gates on the outputs":
        layer.combine = lambda outputs, _: outputs


every_kernel = pytest.mark.parametrize("kernels", [None, "gates on the hidden rows", "gates on the outputs"])


def kept_choices(layer: Experts, experts: Tensor, streams: int) -> Tensor:
    """Expert by expert, who comes first: all first choices, then all second ones, each in the order of the tokens."""
    kept = torch.ones_like(experts, dtype=torch.bool)
    if layer.capacity_factor is None or not layer.training:
        return kept
    tokens, k = experts.shape[0] // streams, experts.shape[1]
    room = math.ceil(tokens * k * layer.capacity_factor / layer.count)
    for p in range(streams):
        taken = [0] * layer.count
        for i in range(k):
            for t in range(tokens):
                e = int(experts[t * streams + p, i])
                kept[t * streams + p, i] = taken[e] < room
                taken[e] += 1
    return kept


def by_definition(layer: Experts, x: Tensor) -> Tensor:
    """Every token by itself: its experts, weighted by the router's gates."""
    gates, experts, _ = layer.router(x.flatten(0, 1), origin(x.shape[0]))
    kept, rows = kept_choices(layer, experts, x.shape[1]), []
    for n, row in enumerate(x.flatten(0, 1)):
        out = row.new_zeros(row.shape)
        for gate, e, within in zip(gates[n], experts[n], kept[n], strict=True):
            out = out + gate * one_expert(layer, int(e), row) * within
        rows.append(out + layer.shared(row) if layer.shared is not None else out)
    return torch.stack(rows).view(x.shape)


@every_router
@settings(max_examples=25)
@given(
    number=st.integers(1, 12),
    streams=st.integers(1, 3),
    count=st.integers(2, 7),
    per_token=st.integers(1, 3),
    shared=st.integers(0, 2),
    capacity=st.sampled_from([None, None, 0.3, 1.0, 1.6]),
    kernels=st.sampled_from([None, "gates on the hidden rows", "gates on the outputs"]),
)
def test_the_layer_is_a_loop_over_tokens(
    router: str,
    number: int,
    streams: int,
    count: int,
    per_token: int,
    shared: int,
    capacity: float | None,
    kernels: str | None,
) -> None:
    per_token = min(per_token, count)
    _, layer = routed(streams, count=count, per_token=per_token, shared=shared, router=router, capacity_factor=capacity)
    use_kernels(layer, kernels)
    x = tokens(number, streams)
    out, report = layer(x, origin(number))
    expected = by_definition(layer, x)
    torch.testing.assert_close(out, expected)
    factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    inputs = (x, *layer.parameters())
    sums = [(y * factors).sum() for y in (out, expected)]
    if all(total.requires_grad for total in sums):
        gradients = [torch.autograd.grad(total, inputs, allow_unused=True) for total in sums]
        for got, want in zip(*gradients, strict=True):
            nothing = torch.zeros(())
            torch.testing.assert_close(nothing if got is None else got, nothing if want is None else want, check_dtype=False)
    if capacity is not None:
        _, experts, _ = layer.router(x.flatten(0, 1), origin(number))
        dropped = (~kept_choices(layer, experts, streams)).sum()
        assert report["dropped"].tolist() == [dropped, number * streams * per_token]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@every_router
def test_narrow_types_stay_close_and_the_router_stays_fp32(router: str, dtype: torch.dtype, tolerance: float) -> None:
    _, layer = routed(per_token=2, dtype=dtype, router=router)
    layer.router.float()
    x = tokens(dtype=dtype)
    out, _ = layer(x, origin(9))
    gates, _, report = layer.router(x.flatten(0, 1), origin(9))
    assert out.dtype == dtype
    assert gates.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in report.values())
    wide = by_definition(layer.double(), x.detach().double())
    assert (out.double() - wide).abs().max() <= tolerance * wide.abs().max()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_dropped_copies_are_never_read(dtype: torch.dtype, kernels: str | None) -> None:
    """They stay behind those of the experts, where grouped products write nothing: here they write what would spread."""
    results = []
    for spoil in (False, True):
        _, layer = routed(per_token=2, dtype=dtype, capacity_factor=0.5, shared=1)
        layer.router.float()
        use_kernels(layer, kernels)
        if spoil:
            layer.multiply = spoiled_behind_the_last_expert
        x = tokens(20, dtype=dtype)
        out, _ = layer(x, origin(20))
        results.append(
            [out, *torch.autograd.grad(out.square().sum(), (x, layer.gate, layer.up, layer.down, layer.router.weight))]
        )
    assert all(torch.isfinite(tensor).all() for tensor in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Spoil(torch.autograd.Function):
    """NaN in the rows from `end` on, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        behind = torch.arange(x.shape[0]) >= end
        assert behind.any()
        return torch.where(behind[:, None], math.nan, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where((torch.arange(grad.shape[0]) >= ctx.saved_tensors[0])[:, None], math.nan, grad), None


def spoiled_behind_the_last_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return Spoil.apply(grouped_linear(Spoil.apply(x, ends[-1]), weight, ends), ends[-1])


@every_router
def test_equal_experts_are_one_dense_feed_forward(router: str) -> None:
    model, layer = routed(per_token=2, router=router)
    dense = SwiGLU(model.width, 16).double()
    with torch.no_grad():
        for experts, linear in ((layer.gate, dense.gate), (layer.up, dense.up), (layer.down, dense.down)):
            experts.copy_(linear.weight.expand_as(experts))
    x = tokens()
    torch.testing.assert_close(layer(x, origin(9))[0], dense(x))


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "s_base"])
def test_permuting_experts_permutes_their_load_and_nothing_else(router: str, per_token: int) -> None:
    _, layer = routed(per_token=per_token, router=router)
    x = tokens()
    out, report = layer(x, origin(9))
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (layer.router.weight, layer.gate, layer.up, layer.down):
            parameter.copy_(parameter[order])
    permuted, permuted_report = layer(x, origin(9))
    torch.testing.assert_close(permuted, out)
    assert torch.equal(permuted_report.pop("load"), report.pop("load")[:, order])
    for name, value in report.items():
        torch.testing.assert_close(permuted_report[name], value)


@every_router
def test_streams_are_routed_by_themselves(router: str) -> None:
    """A stream's choices are the same whether other streams are there or not, but for what it draws as stream 0."""
    _, both = routed(2, per_token=2, router=router)
    _, alone = routed(1, per_token=2, router=router)
    alone.load_state_dict(both.state_dict())
    x = tokens(8, 2)
    _, experts, report = both.router(x.flatten(0, 1), origin(8))
    _, expected, first = alone.router(x[:, 0], origin(8))
    assert torch.equal(experts.view(8, 2, 2)[:, 0], expected)
    assert torch.equal(report["load"][0], first["load"][0])


def test_an_expert_without_tokens_and_one_with_all() -> None:
    _, layer = routed(count=5, router="hash", hash_map="modulo")
    one_id = origin(6, vocab_size=1)
    x = tokens(6)
    out, report = layer(x, one_id)
    assert report["load"].tolist() == [[6, 0, 0, 0, 0]]
    out.square().sum().backward()
    assert layer.gate.grad[0].abs().max() > 0
    assert not layer.gate.grad[1:].any()


def test_capacity_drops_nothing_when_it_covers_the_fullest_expert_and_nothing_in_evaluation() -> None:
    x = tokens(16)
    _, dropless = routed(per_token=2)
    expected, report = dropless(x, origin(16))
    _, roomy = routed(per_token=2, capacity_factor=float(report["load"].max() / report["load"].mean()))
    out, roomy_report = roomy(x, origin(16))
    assert torch.equal(out, expected)
    assert roomy_report["dropped"].tolist() == [0, 32]
    _, tight = routed(per_token=2, capacity_factor=0.1)
    assert tight(x, origin(16))[1]["dropped"][0] > 20
    evaluated, nothing = tight.eval()(x, origin(16))
    torch.testing.assert_close(evaluated, expected)
    assert nothing == {}


@settings(max_examples=30)
@given(
    number=st.integers(1, 20),
    streams=st.integers(1, 3),
    per_token=st.integers(1, 4),
    capacity=st.floats(0.05, 3),
    cut=st.integers(0, 20),
)
def test_no_expert_takes_more_than_its_capacity_and_earlier_ones_go_first(
    number: int, streams: int, per_token: int, capacity: float, cut: int
) -> None:
    _, layer = routed(streams, count=5, per_token=per_token, capacity_factor=capacity)
    _, experts, _ = layer.router(tokens(number, streams).flatten(0, 1), origin(number))
    within = layer.within_capacity(experts, streams)
    assert torch.equal(within, kept_choices(layer, experts, streams))
    room = math.ceil(number * per_token * capacity / 5)
    for p in range(streams):
        mine, taken = experts.view(number, streams, -1)[:, p], within.view(number, streams, -1)[:, p]
        load = torch.bincount(mine[taken], minlength=5)
        assert torch.equal(load, torch.bincount(mine.flatten(), minlength=5).clamp(max=room))
    # two ranks, the first with the earlier tokens, decide as one does
    cut = min(cut, number) * streams
    counts: list[Tensor] = []
    layer.population_order = lambda here: counts.append(here) or (here, here)  # type: ignore[func-returns-value]
    for part in (experts[:cut], experts[cut:]):
        layer.within_capacity(part, streams)
    found = []
    for rank, part in enumerate((experts[:cut], experts[cut:])):
        before = sum(counts[:rank], torch.zeros_like(counts[0]))
        layer.population_order = lambda here, before=before: (before, counts[0] + counts[1])  # type: ignore[misc]
        found.append(layer.within_capacity(part, streams))
    assert torch.equal(torch.cat(found), within)


@every_kernel
@pytest.mark.parametrize("capacity", [None, 0.7])
@every_router
def test_repetition_gives_the_same_bits(router: str, capacity: float | None, kernels: str | None) -> None:
    _, layer = routed(per_token=2, dtype=torch.float32, router=router, capacity_factor=capacity)
    use_kernels(layer, kernels)
    x = tokens(50, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out, report = layer(x, origin(50))
        runs.append([out, *torch.autograd.grad(out.sum(), (x, layer.gate, layer.up, layer.down)), *report.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class NothingWaits(TorchDispatchMode):
    """Fails where the host would wait for a value of the device."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "bincount",
        "equal",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operator._schema.name.split("::")[1]
        assert name not in self.WAITING, f"{name} waits for the device"
        if name == "index":  # a mask would have to be counted
            assert all(index is None or index.dtype != torch.bool for index in arguments[1]), (
                "indexing by a mask waits for the device"
            )
        self.called.add(name)
        return operator(*arguments, **(options or {}))


@every_kernel
@pytest.mark.parametrize("capacity", [None, 0.7])
@every_router
def test_nothing_waits_for_the_device(router: str, capacity: float | None, kernels: str | None) -> None:
    """Shapes are known without values, as dry runs on meta tensors need, with a capacity too; no value goes to the host."""
    _, layer = routed(2, per_token=2, dtype=torch.float32, router=router, capacity_factor=capacity)
    use_kernels(layer, kernels)
    here = origin(8)
    there = Origin(here.ids.to("meta"), here.counter.to("meta"), here.key.to("meta"))
    layer = layer.to("meta")
    with NothingWaits() as watched:
        out, report = layer(torch.empty(8, 2, 32, device="meta", requires_grad=True), there)
        out.sum().backward()
    assert out.shape == (8, 2, 32)
    assert report["load"].shape == (2, 4)
    operators = {"sort_copies", "write_copies", "sum_copies"}
    behind = {"weighted_sum", "weighted_sum_backward", "swiglu", "swiglu_backward"}
    on_hidden = {"weighted_swiglu", "weighted_swiglu_backward"}
    expected = {
        None: {"sort_copies"},
        "gates on the hidden rows": operators | on_hidden,
        "gates on the outputs": operators | behind,
    }
    assert watched.called & (operators | behind | on_hidden) == expected[kernels]


def test_waiting_is_noticed() -> None:
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.long().bincount()):
        with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
            wait(torch.ones(3))


def test_on_a_gpu_the_kernels_are_used() -> None:
    """Tensors without memory that say they are on one."""
    model, _ = routed(2, per_token=2, dtype=torch.float32)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), NothingWaits() as watched:
        layer, here = Experts(model).eval(), torch.empty(8, dtype=torch.int64)
        layer(torch.empty(8, 2, 32), Origin(here, torch.empty(8, 2, dtype=torch.int64), torch.empty(2, dtype=torch.int64)))
    assert {"sort_copies", "write_copies", "weighted_swiglu", "sum_copies"} <= watched.called


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "capacity", "scope", "kernels"),
    [
        ("softmax", None, "global", None),
        ("softmax", 0.7, "rank", None),
        ("softmax", 0.7, "rank", "gates on the hidden rows"),
        ("sigmoid", None, "global", None),
        ("s_base", 0.7, "global", None),
        ("s_base", 0.7, "global", "gates on the outputs"),
        ("rl_r", None, "global", None),
        ("hash", 0.7, "global", None),
    ],
)
def test_the_compiled_layer_agrees(router: str, capacity: float | None, scope: Any, kernels: str | None) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        _, layer = routed(2, per_token=2, dtype=torch.float32, router=router, capacity_factor=capacity, scope=scope)
        use_kernels(layer, kernels)
        if compiled:
            layer.compile(backend="aot_eager")
        for number in (12, 20, 9):  # other numbers of rows are other graphs
            layer.zero_grad()
            x = tokens(number, 2, torch.float32)
            out, report = layer(x, origin(number))
            (out.square().sum() + sum(value.sum() for value in report.values() if value.requires_grad)).backward()
            results.append([out, *report.values(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for eager, traced in zip(results[:3], results[3:], strict=True):
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
