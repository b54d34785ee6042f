"""Routed experts against a loop over tokens; balance and z-loss by their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.config.schema import Model
from megascale.model.layers import SwiGLU
from megascale.model.routing import Experts, Router, take_rows
from tiny import tiny_model


def routed(streams: int = 1, dtype: torch.dtype = torch.float64, **experts) -> tuple[Model, Experts]:
    model = tiny_model(streams={"count": streams}, experts={"count": 4, "width": 16, **experts})
    torch.manual_seed(0)
    layer = Experts(model).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, layer


def tokens(number: int = 9, streams: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, streams, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def one_expert(layer: Experts, e: int, x: Tensor) -> Tensor:
    return layer.down[e] @ (F.silu(layer.gate[e] @ x) * (layer.up[e] @ x))


def by_definition(layer: Experts, x: Tensor) -> Tensor:
    """Every token by itself: its k best experts, weighted by their probabilities."""
    k, rows = layer.router.per_token, []
    for row in x.flatten(0, 1):
        probabilities = (layer.router.weight @ row).softmax(-1)
        chosen = probabilities.argsort(descending=True)[:k]
        gates = probabilities[chosen] / (probabilities[chosen].sum() if k > 1 else 1)
        out = sum(gate * one_expert(layer, int(e), row) for gate, e in zip(gates, chosen, strict=True))
        rows.append(out + layer.shared(row) if layer.shared is not None else out)
    return torch.stack(rows).view(x.shape)


@settings(max_examples=25)
@given(
    number=st.integers(1, 12),
    streams=st.integers(1, 3),
    count=st.integers(2, 6),
    per_token=st.integers(1, 3),
    shared=st.integers(0, 2),
)
def test_the_layer_is_a_loop_over_tokens(number: int, streams: int, count: int, per_token: int, shared: int) -> None:
    _, layer = routed(streams, count=count, per_token=min(per_token, count), shared=shared)
    x = tokens(number, streams)
    out, _ = layer(x)
    expected = by_definition(layer, x)
    torch.testing.assert_close(out, expected)
    factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    inputs = (x, *layer.parameters())
    found, true = ((y * factors).sum() for y in (out, expected))
    for got, want in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(true, inputs, allow_unused=True), strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_narrow_types_stay_close_and_the_router_stays_fp32(dtype: torch.dtype, tolerance: float) -> None:
    _, layer = routed(per_token=2, dtype=dtype)
    layer.router.float()
    x = tokens(dtype=dtype)
    out, _ = layer(x)
    gates, _, _ = layer.router(x.flatten(0, 1))
    assert out.dtype == dtype
    assert gates.dtype == torch.float32
    wide = by_definition(layer.double(), x.detach().double())
    assert (out.double() - wide).abs().max() <= tolerance * wide.abs().max()


def test_equal_experts_are_one_dense_feed_forward() -> None:
    model, layer = routed(per_token=2)
    dense = SwiGLU(model.width, 16).double()
    with torch.no_grad():
        for experts, linear in ((layer.gate, dense.gate), (layer.up, dense.up), (layer.down, dense.down)):
            experts.copy_(linear.weight.expand_as(experts))
    x = tokens()
    torch.testing.assert_close(layer(x)[0], dense(x))


@pytest.mark.parametrize("per_token", [1, 2])
def test_permuting_experts_permutes_their_load_and_nothing_else(per_token: int) -> None:
    _, layer = routed(per_token=per_token)
    x = tokens()
    out, report = layer(x)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (layer.router.weight, layer.gate, layer.up, layer.down):
            parameter.copy_(parameter[order])
    permuted, permuted_report = layer(x)
    torch.testing.assert_close(permuted, out)
    assert torch.equal(permuted_report["load"], report["load"][:, order])
    for name in ("balance", "router_z"):
        torch.testing.assert_close(permuted_report[name], report[name])


def test_gates_sum_to_one_for_several_experts_and_are_the_probability_for_one() -> None:
    x = tokens().flatten(0, 1)
    _, two = routed(per_token=2)
    torch.testing.assert_close(two.router(x)[0].sum(-1), torch.ones(9, dtype=x.dtype))
    _, one = routed(per_token=1)
    gates, experts, _ = one.router(x)
    probabilities = (x @ one.router.weight.t()).softmax(-1)
    torch.testing.assert_close(gates, probabilities.max(-1, keepdim=True).values)
    assert torch.equal(experts[:, 0], probabilities.argmax(-1))


def test_the_router_learns_from_the_language_model_loss_also_with_one_expert_per_token() -> None:
    _, layer = routed(per_token=1)
    layer(tokens())[0].sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("per_token", [1, 2])
def test_balance_and_z_are_their_formulas(streams: int, per_token: int) -> None:
    _, layer = routed(streams, per_token=per_token)
    x = tokens(7, streams)
    _, experts, report = layer.router(x.flatten(0, 1))
    logits = x @ layer.router.weight.t()
    chosen = experts.view(7, streams, per_token)
    balance = torch.zeros((), dtype=x.dtype)
    for p in range(streams):
        load = torch.bincount(chosen[:, p].flatten(), minlength=4)
        assert torch.equal(report["load"][p], load.to(x.dtype))
        balance = balance + 4 * (load / (7 * per_token) * logits[:, p].softmax(-1).mean(0)).sum() / streams
    torch.testing.assert_close(report["balance"], balance)
    torch.testing.assert_close(report["router_z"], logits.logsumexp(-1).square().mean())
    assert balance >= 1 - 1e-6 or per_token > 1  # even loads give 1, the least for one expert per token


def test_even_routing_has_balance_one_and_collapse_has_e() -> None:
    model = tiny_model(experts={"count": 4, "width": 16})
    router = Router(model).double()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :4] = torch.eye(4) * 1000
    even = torch.eye(32, dtype=torch.float64)[[0, 1, 2, 3] * 3]
    torch.testing.assert_close(router(even)[2]["balance"], torch.tensor(1.0, dtype=torch.float64))
    collapsed = torch.eye(32, dtype=torch.float64)[[2] * 12]
    torch.testing.assert_close(router(collapsed)[2]["balance"], torch.tensor(4.0, dtype=torch.float64))


def test_a_larger_population_leaves_each_part_its_share() -> None:
    """Two halves that exchange their counts give together what the whole gives alone."""
    _, layer = routed(2, per_token=2)
    rows = tokens(8, 2).flatten(0, 1)
    whole = layer.router(rows)[2]
    halves = [rows[:6], rows[6:]]
    counts: list[Tensor] = []
    layer.router.population_sum = lambda x: counts.append(x) or x  # type: ignore[func-returns-value]
    for half in halves:
        layer.router(half)
    layer.router.population_sum = lambda _: counts[0] + counts[1]
    parts = [layer.router(half)[2] for half in halves]
    for name in ("balance", "router_z"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    assert torch.equal(parts[0]["load"], whole["load"])


def test_take_rows_is_indexing_with_its_gradient() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 3, 1, 1, 0, 2, 3])
    places = torch.stack([(index == row).nonzero().flatten() for row in range(4)])
    torch.testing.assert_close(take_rows(x, index, places), x[index])
    assert torch.autograd.gradcheck(lambda y: take_rows(y, index, places), x)


def test_repetition_gives_the_same_bits() -> None:
    _, layer = routed(per_token=2, dtype=torch.float32)
    x = tokens(50, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out, _ = layer(x)
        runs.append([out, *torch.autograd.grad(out.sum(), (x, *layer.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
