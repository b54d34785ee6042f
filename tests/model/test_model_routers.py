"""Each router by its definition: choices, gates, losses, and what keeps it balanced."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.config.schema import Experts
from megascale.model.exchange import identity
from megascale.model.hash_table import hash_table
from megascale.model.routers import (
    ROUTERS,
    HashRouter,
    ReinforceRouter,
    Router,
    SigmoidRouter,
    draw,
    log_probability,
    loss_weights,
)
from megascale.model.sinkhorn import column_error, column_sums, sinkhorn
from tiny import origin, tiny_model

every_router = pytest.mark.parametrize("router", ROUTERS)
WITH_LOGITS = [name for name in ROUTERS if name != "hash"]


def router_of(kind: str, streams: int = 1, std: float = 0.3, **experts: Any) -> Any:
    model = tiny_model(streams={"count": streams}, experts={"count": 4, "width": 16, "router": kind, **experts})
    torch.manual_seed(0)
    router = ROUTERS[kind](model).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=std)
    router.start(0, 0)
    return router


def rows(number: int, streams: int = 1) -> Tensor:
    return torch.randn(number * streams, 32, generator=torch.Generator().manual_seed(1)).double()


def route(router: Router, x: Tensor, **key: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return router(x, origin(x.shape[0] // router.streams, **key))


# All of them ----------------------------------------------------------------------------------------------------------


@every_router
@settings(max_examples=20)
@given(
    number=st.integers(1, 30),
    streams=st.integers(1, 3),
    count=st.integers(2, 9),
    per_token=st.integers(1, 9),
    training=st.booleans(),
    std=st.sampled_from([0.0, 0.3, 30.0]),
)
def test_choices_are_distinct_gates_sum_to_one_and_loads_to_all_choices(
    router: str, number: int, streams: int, count: int, per_token: int, training: bool, std: float
) -> None:
    assume(per_token <= count)
    instance = router_of(router, streams, std, count=count, per_token=per_token).train(training)
    gates, experts, report = route(instance, rows(number, streams))
    assert experts.shape == gates.shape == (number * streams, per_token)
    assert (experts >= 0).all() and (experts < count).all()
    assert all(len(set(row)) == per_token for row in experts.tolist())
    assert (gates >= 0).all() and (gates <= 1).all()
    if per_token > 1:
        torch.testing.assert_close(gates.sum(-1).double(), torch.ones(len(gates)).double(), atol=1e-6, rtol=0)
    if not training:
        assert report == {}
        return
    assert report["load"].shape == (streams, count)
    assert torch.equal(report["load"].sum(-1), torch.full((streams,), float(number * per_token)))
    assert torch.equal(report["load"].sum(0).long(), torch.bincount(experts.flatten(), minlength=count))
    assert all(value.isfinite().all() for value in report.values())


@every_router
def test_every_new_parameter_gets_a_gradient(router: str) -> None:
    for per_token in (1, 2):
        instance = router_of(router, per_token=per_token)
        gates, _, report = route(instance, rows(40))
        weights = torch.linspace(0.1, 1, gates.numel(), dtype=gates.dtype).view(gates.shape)
        loss = (gates * weights).sum() + sum(value.sum() for value in report.values())
        if loss.requires_grad:
            loss.backward()
        for name, parameter in instance.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().amax(-1).min() > 0, name


@every_router
def test_losses_are_what_the_weights_name(router: str) -> None:
    for balance_loss in (0.0, 0.5):
        experts = Experts(count=4, router=router, balance_loss=balance_loss)
        _, _, report = route(router_of(router, balance_loss=balance_loss), rows(8))
        named = set(loss_weights(experts)) - {"policy", "baseline"}  # those come with the reward
        assert named == set(report) & {"balance", "router_z", "entropy"}
    assert loss_weights(Experts(count=1, router=router)) == {}


@every_router
def test_a_larger_population_leaves_each_part_its_share(router: str) -> None:
    """Two ranks with half of the tokens each route as one with all: their exchanges are replayed until both know the other's counts."""
    whole_router = router_of(router, 2, per_token=2)
    x = rows(12, 2)
    _, whole_experts, whole = route(whole_router, x)
    there = origin(12)
    parts = [slice(0, 10), slice(10, 24)]
    origins = [type(there)(there.ids[a:b], there.counter[a:b], there.key) for a, b in [(0, 5), (5, 12)]]
    sums: list[Tensor] = []
    while True:
        found, asked = [], []
        for part, here in zip(parts, origins, strict=True):
            calls = iter(sums)
            mine: list[Tensor] = []

            def exchange(counts: Tensor, calls: Any = calls, mine: list[Tensor] = mine) -> Tensor:
                known = next(calls, None)
                if known is None:
                    mine.append(counts)
                    return counts
                return known

            whole_router.population_sum = exchange
            found.append(whole_router(x[part], here))
            asked.append(mine)
        if not asked[0]:
            break
        sums.append(asked[0][0] + asked[1][0])
    assert torch.equal(torch.cat([experts for _, experts, _ in found]), whole_experts)
    for name in whole:
        one, two = (report[name] for _, _, report in found)
        if name == "policy":
            torch.testing.assert_close(torch.cat([one, two]), whole[name])
        elif name == "residual":
            torch.testing.assert_close(one, whole[name])
            torch.testing.assert_close(two, whole[name])
        else:
            torch.testing.assert_close(one + two, whole[name])


@every_router
def test_in_evaluation_nothing_is_exchanged_or_drawn(router: str) -> None:
    instance = router_of(router).eval()
    instance.population_sum = None
    x = rows(8)
    first, second = (route(instance, x, step=step, seed=step) for step in (1, 2))
    assert torch.equal(first[1], second[1])
    if router in ("s_base", "rl_r", "softmax"):
        assert torch.equal(first[1][:, 0], (x @ instance.weight.T).argmax(-1))


# Losses of the softmax ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "rl_r"])
def test_balance_and_z_are_their_formulas(kind: str, streams: int, per_token: int) -> None:
    router = router_of(kind, streams, per_token=per_token, balance_loss=0.1)
    x = rows(7, streams)
    _, experts, report = route(router, x)
    logits = x @ router.weight.t()
    scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
    scores = (scores / scores.sum(-1, keepdim=True)).view(7, streams, 4)
    balance = torch.zeros((), dtype=x.dtype)
    for p in range(streams):
        load = torch.bincount(experts.view(7, streams, per_token)[:, p].flatten(), minlength=4)
        assert torch.equal(report["load"][p], load.float())
        balance = balance + 4 * (load / (7 * per_token) * scores[:, p].mean(0)).sum() / streams
    torch.testing.assert_close(report["balance"], balance)
    if kind != "sigmoid":
        torch.testing.assert_close(report["router_z"], logits.logsumexp(-1).square().mean())


def test_even_routing_has_balance_one_and_collapse_has_e() -> None:
    router = router_of("softmax")
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :4] = torch.eye(4) * 1000
    even = torch.eye(32, dtype=torch.float64)[[0, 1, 2, 3] * 3]
    torch.testing.assert_close(route(router, even)[2]["balance"], torch.tensor(1.0, dtype=torch.float64))
    collapsed = torch.eye(32, dtype=torch.float64)[[2] * 12]
    torch.testing.assert_close(route(router, collapsed)[2]["balance"], torch.tensor(4.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "s_base"])
def test_gates_are_scores_of_the_logits(kind: str) -> None:
    x = rows(9)
    for per_token, gate in itertools.product((1, 2), ("softmax", "sigmoid") if kind == "s_base" else ("softmax",)):
        router = router_of(kind, per_token=per_token, gate=gate)
        gates, experts, _ = route(router, x)
        logits = x @ router.weight.t()
        scores = logits.sigmoid() if "sigmoid" in (kind, gate) else logits.softmax(-1)
        expected = torch.stack([score[chosen] for score, chosen in zip(scores, experts, strict=True)])
        torch.testing.assert_close(gates, expected / expected.sum(-1, keepdim=True) if per_token > 1 else expected)
        gates.square().sum().backward()
        assert router.weight.grad.abs().max() > 1e-4  # the router learns from the language model's loss


# Sigmoid with a bias --------------------------------------------------------------------------------------------------


def test_the_bias_moves_the_choice_and_not_the_gate() -> None:
    router: SigmoidRouter = router_of("sigmoid", per_token=2)
    x = rows(30)
    router.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    scores = (x @ router.weight.t()).sigmoid()
    gates, experts, _ = route(router, x)
    for score, gate, chosen in zip(scores, gates, experts, strict=True):
        best = sorted(range(4), key=lambda e: -float(score.detach()[e] + router.bias[e]))[:2]
        assert chosen.tolist() == best
        torch.testing.assert_close(gate, score[best] / score[best].sum())
    router.bias.zero_()
    assert not torch.equal(route(router, x)[1], experts)


def test_the_bias_moves_by_the_rate_towards_even_loads() -> None:
    router: SigmoidRouter = router_of("sigmoid", bias_rate=0.01)
    router.move_bias(torch.tensor([5.0, 0.0, 2.0, 1.0]).double())
    torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.01, 0.0, 0.01]).double())


def test_the_bias_balances_a_collapsed_router() -> None:
    router: SigmoidRouter = router_of("sigmoid", bias_rate=0.02)
    x = rows(400) + 0.5
    loads = []
    for _ in range(150):
        loads.append(route(router, x)[2]["load"][0])
        router.move_bias(loads[-1].double())
    assert loads[0].max() > 170
    assert loads[-1].max() < 130


# S-BASE ---------------------------------------------------------------------------------------------------------------

LOGITS = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(2, 7), st.sampled_from([0.1, 1.0, 4.0]), st.integers(0, 99))


def random_logits(size: tuple[int, int, int, float, int]) -> Tensor:
    *shape, std, seed = size
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * std


def plan_by_definition(logits: Tensor, iterations: int) -> Tensor:
    """Sinkhorn on exp(logits) [T, E]: rows to 1 and columns to T / E in turn, in the plain domain; rows last."""
    plan = logits.exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan * (plan.shape[0] / plan.shape[1]) / plan.sum(0, keepdim=True)
    return plan / plan.sum(1, keepdim=True)


@given(size=LOGITS, iterations=st.integers(1, 12))
def test_the_plan_is_that_of_sinkhorns_iteration(size: tuple[int, int, int, float, int], iterations: int) -> None:
    logits = random_logits(size)
    potentials = sinkhorn(logits, identity, iterations, None)
    plan = (logits + potentials).softmax(-1)
    for p in range(logits.shape[1]):
        torch.testing.assert_close(plan[:, p], plan_by_definition(logits[:, p], iterations))


@settings(max_examples=20)
@given(size=LOGITS)
def test_the_plan_converges_to_even_columns(size: tuple[int, int, int, float, int]) -> None:
    logits = random_logits(size)
    errors = [column_error(column_sums(logits, sinkhorn(logits, identity, n, None))).max() for n in (1, 8, 400)]
    assert errors[1] <= errors[0] + 1e-9
    assert errors[2] < 1e-2


@settings(max_examples=20)
@given(size=LOGITS, shift=st.floats(-50, 50))
def test_the_plan_ignores_what_is_added_to_a_row_or_a_column(size: tuple[int, int, int, float, int], shift: float) -> None:
    logits = random_logits(size)
    plan = (logits + sinkhorn(logits, identity, 400, None)).softmax(-1)
    changed = logits + shift * torch.arange(logits.shape[0])[:, None, None] / logits.shape[0]
    changed[..., 0] += shift / 10
    torch.testing.assert_close((changed + sinkhorn(changed, identity, 400, None)).softmax(-1), plan, atol=2e-3, rtol=0)


def test_a_good_plan_is_left_alone() -> None:
    logits = random_logits((40, 2, 5, 1.0, 0))
    for stop in (1, 2, 3):
        potentials = sinkhorn(logits, identity, stop, None)
        errors = column_error(column_sums(logits, potentials))
        tolerance = float(errors.max()) * 1.0001
        torch.testing.assert_close(sinkhorn(logits, identity, 50, tolerance)[errors.argmax()], potentials[errors.argmax()])
    assert column_error(column_sums(logits, sinkhorn(logits, identity, 50, 0.01))).max() <= 0.01


def test_extreme_logits_stay_finite_in_fp32() -> None:
    logits = torch.zeros(64, 1, 8)
    logits[..., 3] = 1e4
    potentials = sinkhorn(logits, identity, 8, None)
    assert potentials.isfinite().all()
    logits[:, 0, 5] = -1e4
    assert sinkhorn(logits, identity, 8, None).isfinite().all()


@pytest.mark.parametrize("per_token", [1, 2])
def test_training_takes_the_best_of_the_plan_and_reports_its_error(per_token: int) -> None:
    router = router_of("s_base", 2, per_token=per_token, sinkhorn_iterations=5)
    x = rows(50, 2) + 0.3
    _, experts, report = route(router, x)
    logits = (x @ router.weight.t()).view(50, 2, 4).detach()
    errors = []
    for p in range(2):
        plan = plan_by_definition(logits[:, p], 5)
        assert torch.equal(experts.view(50, 2, per_token)[:, p], plan.topk(per_token, -1).indices)
        errors.append((plan.sum(0) / 12.5 - 1).abs().max())
    torch.testing.assert_close(report["residual"], torch.tensor([sum(errors), 2.0]).double())


def test_it_balances_a_router_that_collapses() -> None:
    x = rows(400) + 0.5
    collapsed = route(router_of("softmax"), x)[2]["load"].max()
    balanced = route(router_of("s_base"), x)[2]["load"].max()
    assert collapsed > 170
    assert balanced < 125


# RL-R -----------------------------------------------------------------------------------------------------------------


def test_choices_are_drawn_from_the_policy() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).double()
    router: ReinforceRouter = router_of("rl_r")
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = logits
    number = 20000
    _, experts, _ = route(router, torch.eye(32).double()[:1].expand(number, -1))
    found = torch.bincount(experts.flatten(), minlength=4) / number
    expected = logits.softmax(0)
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / number).sqrt()).all()


def test_several_choices_follow_plackett_luce() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0]).double()
    number = 30000
    numbers = origin(number).draws(1, 2)[:, 0]
    experts = draw(logits.expand(number, -1), numbers)
    for pair in itertools.permutations(range(3), 2):
        p = logits.softmax(0)
        expected = float(p[pair[0]] * p[pair[1]] / (1 - p[pair[0]]))
        found = float((experts == torch.tensor(pair)).all(-1).double().mean())
        assert abs(found - expected) < 4 * (expected * (1 - expected) / number) ** 0.5
        log_pi, _ = log_probability(logits[None], torch.tensor([pair]))
        assert float(log_pi.exp()) == pytest.approx(expected)


@settings(max_examples=30)
@given(count=st.integers(2, 6), per_token=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_gradient_of_the_log_probability_and_its_norm(count: int, per_token: int, seed: int) -> None:
    assume(per_token < count)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, count, generator=generator).double().requires_grad_()
    experts = torch.stack([torch.randperm(count, generator=generator)[:per_token] for _ in range(5)])
    log_pi, squared_norm = log_probability(logits, experts)
    (gradient,) = torch.autograd.grad(log_pi.sum(), logits)
    torch.testing.assert_close(squared_norm, gradient.square().sum(-1))
    assert not squared_norm.requires_grad
    expected = torch.zeros(5).double()
    for row in range(5):
        left = list(range(count))
        for expert in experts[row].tolist():
            expected[row] += logits[row, expert].detach() - logits[row, left].logsumexp(0).detach()
            left.remove(expert)
    torch.testing.assert_close(log_pi.detach(), expected)


def test_the_end_of_the_unit_interval_never_draws_what_has_no_probability() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [50.0, -torch.inf, -torch.inf]])
    for number in (0.0, 1 - 2**-24):
        first = draw(logits, torch.full((2, 1), number).double())
        assert first[0] < 2
        assert first[1] == 0
    one_certain = torch.tensor([[1e5, 0.0, 0.0]])
    assert sorted(draw(one_certain, torch.full((1, 3), 0.999999).double())[0].tolist()) == [0, 1, 2]


def test_draws_change_with_the_step_and_nothing_else() -> None:
    router: ReinforceRouter = router_of("rl_r")
    x = rows(50)
    torch.manual_seed(1)
    first = route(router, x, step=1)[1]
    torch.manual_seed(2)
    assert torch.equal(route(router, x, step=1)[1], first)
    assert not torch.equal(route(router, x, step=2)[1], first)


def test_the_baseline_teaches_nothing_below_it_and_entropy_is_the_policys() -> None:
    router: ReinforceRouter = router_of("rl_r", 2)
    x = rows(10, 2).requires_grad_()
    _, experts, report = route(router, x)
    baseline = report["policy"][..., 1]
    assert not torch.autograd.grad(baseline.sum(), x, retain_graph=True)[0].any()
    hidden = torch.nn.functional.silu(x @ router.baseline_hidden.T)
    torch.testing.assert_close(baseline.flatten(), (hidden @ router.baseline_out.T)[:, 0].detach(), check_dtype=False)
    policy = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(report["entropy"], torch.distributions.Categorical(policy).entropy().mean())
    torch.testing.assert_close(report["policy"][..., 0].flatten(), policy.gather(1, experts)[:, 0].log())


# HASH -----------------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(["modulo", "random", "balanced"]),
    vocabulary=st.integers(1, 60),
    count=st.integers(2, 9),
    per_token=st.integers(1, 9),
    layer=st.integers(0, 3),
)
def test_a_table_has_distinct_experts_and_is_its_arguments(
    kind: str, vocabulary: int, count: int, per_token: int, layer: int
) -> None:
    per_token = min(per_token, count)
    table = hash_table(kind, vocabulary, per_token, count, 5, layer)
    assert table.shape == (vocabulary, per_token)
    assert all(len(set(row)) == per_token and set(row) <= set(range(count)) for row in table.tolist())
    assert torch.equal(table, hash_table(kind, vocabulary, per_token, count, 5, layer))


def test_modulo_is_the_remainder() -> None:
    assert hash_table("modulo", 7, 2, 3, 0, 0).tolist() == [[i % 3, (i + 1) % 3] for i in range(7)]


def test_random_tables_are_even_and_differ_between_layers_and_seeds() -> None:
    table = hash_table("random", 8000, 2, 8, 1, 2)
    for choice in range(2):
        counts = torch.bincount(table[:, choice], minlength=8)
        assert (counts - 1000).abs().max() < 5 * 30
    for other in (hash_table("random", 8000, 2, 8, 1, 3), hash_table("random", 8000, 2, 8, 2, 2)):
        assert 0.1 < (other[:, 0] == table[:, 0]).double().mean() < 0.15


@settings(max_examples=30)
@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=60), count=st.integers(2, 6), per_token=st.integers(1, 6))
def test_balanced_tables_are_within_one_id_of_even(counts: list[int], count: int, per_token: int) -> None:
    """The bound of greedy scheduling, in any order: no expert has more than the mean and the largest id."""
    per_token = min(per_token, count)
    table = hash_table("balanced", len(counts), per_token, count, 0, 0, torch.tensor(counts))
    weights = torch.tensor(counts).double() + 1
    loads = torch.zeros(count).double().index_add(0, table.flatten(), weights.repeat_interleave(per_token))
    assert loads.max() <= loads.mean() + weights.max()


def test_balanced_tables_even_out_a_zipf_vocabulary_where_random_ones_do_not() -> None:
    counts = (1e6 / torch.arange(1, 5001)).long()
    loads = {}
    for kind in ("random", "balanced"):
        table = hash_table(kind, 5000, 1, 16, 0, 0, counts)[:, 0]
        loads[kind] = torch.zeros(16).double().index_add(0, table, counts.double())
    mean = loads["balanced"].mean()
    largest = counts.max() / mean
    assert loads["balanced"].max() / mean < max(1.01, 1.01 * largest)
    assert loads["random"].max() / mean > 1.5
    first, second = (hash_table("balanced", 5000, 1, 16, 0, layer, counts)[:, 0] for layer in (0, 1))
    together = [[(t[a] == t[b]).item() for a, b in itertools.combinations(range(64), 2)] for t in (first, second)]
    assert sum(x and y for x, y in zip(*together, strict=True)) < 0.3 * sum(together[0])  # other ids meet in another layer


def test_the_router_looks_ids_up_whatever_the_state() -> None:
    router: HashRouter = router_of("hash", 2, per_token=2)
    here = origin(9)
    _, experts, _ = router(rows(9, 2), here)
    assert torch.equal(experts.view(9, 2, 2)[:, 0], router.table[here.ids].long())
    assert torch.equal(experts.view(9, 2, 2)[:, 1], router.table[here.ids].long())
    assert torch.equal(router(rows(9, 2) * 7, here)[1], experts)
