"""Experts over several ranks, whole or by their width: the run of one process, few host synchronisations, and rows under way meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from layouts import ADAMW, SGD_LIKE, References, change, full_unless, problems, train
from megascale.config.schema import Config, Model, Parallel
from megascale.model.layers import SwiGLU
from megascale.model.routing import Experts
from megascale.parallel import expert_exchange
from megascale.parallel.apply import apply, describe_dispatch
from megascale.parallel.mesh import Layout, Mesh, make_layout, open_mesh
from megascale.parallel.transfer import Transfer
from megascale.train.batch_stream import step_batches
from ranks import RankPool
from runs import ALL_AXES, build_parts, one_process, tiny_config
from tiny import origin, tiny_model

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
LAYOUTS = {
    "tp2-etp2": (2, "parallel={tp: 2, etp: 2, zero_stage: 0}"),
    "tp2-ep2-etp2": (4, "parallel={tp: 2, ep: 2, etp: 2, zero_stage: 0}"),
    "tp2-etp2-zero1": (4, "parallel={tp: 2, etp: 2, zero_stage: 1}"),
    "tp2-ep2-etp2-zero2": (8, "parallel={tp: 2, ep: 2, etp: 2, zero_stage: 2}"),
    "tp2-etp2-zero3": (4, "parallel={tp: 2, etp: 2, zero_stage: 3}"),
    "tp4-etp4": (4, "parallel={tp: 4, etp: 4, zero_stage: 0}"),
    "cp2-tp2-ep2-etp2": (4, "parallel={cp: 2, tp: 2, ep: 2, etp: 2, zero_stage: 0}"),
    "stream2-tp2-ep2-etp2": (4, "parallel={stream: 2, tp: 2, ep: 2, etp: 2, zero_stage: 0}"),
    "pp2-tp2-ep2-etp2": (8, "parallel={pp: 2, tp: 2, ep: 2, etp: 2, zero_stage: 0}"),
    "pp2-zbv-tp2-etp2": (4, "parallel={pp: 2, tp: 2, etp: 2, schedule: zbv, zero_stage: 0}"),
    "tp2-ep2-etp2-recomputed": (4, "parallel={tp: 2, ep: 2, etp: 2, recompute: layer, zero_stage: 0}"),
    "tp2-ep2-etp2-streams-apart": (4, "parallel={tp: 2, ep: 2, etp: 2, recompute: stream, zero_stage: 0}"),
}
"""Name -> ranks, settings. dp is what is left of the world."""


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> References:
    return References(ranks, tmp_path_factory.mktemp("one"), tiny_corpus, MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("layout", full_unless(["tp2-ep2-etp2", "tp2-etp2-zero1"], LAYOUTS))
def test_a_layout_that_splits_experts_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, layout, MODEL, *ADAMW, parallel)
    assert problems(found, one(*ADAMW)) == []


OTHER_RUNS = {
    "a capacity": ("tp2-ep2-etp2", ("model.experts.capacity_factor=0.8",)),
    "a capacity without expert parallel ranks": ("tp2-etp2", ("model.experts.capacity_factor=0.8",)),
    "a shared expert": ("tp2-ep2-etp2", ("model.experts.shared=1",)),
    "sigmoid": ("tp2-ep2-etp2", ("model.experts.router=sigmoid",)),
    "s_base": ("tp2-ep2-etp2", ("model.experts.router=s_base",)),
    "rl_r": ("tp2-ep2-etp2", ("model.experts.router=rl_r", "model.experts.per_token=1")),
    "hash": ("tp2-ep2-etp2", ("model.experts.router=hash",)),
    "validation": ("tp2-ep2-etp2", ("validation={every: 2, sequences: 19}",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", full_unless(["a capacity"], OTHER_RUNS))
def test_it_holds_for(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, what: str) -> None:
    layout, settings = OTHER_RUNS[what]
    world, parallel = LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *SGD_LIKE, parallel, *settings)
    assert problems(found, one(*SGD_LIKE, *settings)) == []


WHOLE = (4, "parallel={tp: 2, ep: 2, zero_stage: 0}")
CHANGES = {
    "whole to parts": (WHOLE, LAYOUTS["tp2-etp2-zero1"]),
    "parts to whole": (LAYOUTS["tp2-ep2-etp2"], WHOLE),
    "ZeRO's parts to others": (LAYOUTS["tp2-etp2-zero1"], LAYOUTS["tp4-etp4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", full_unless(["whole to parts"], CHANGES))
def test_a_checkpoint_goes_on_where_experts_are_split_otherwise(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References, name: str
) -> None:
    ways = [(world, (MODEL, *ADAMW, parallel)) for world, parallel in CHANGES[name]]
    joined, other = change(ranks, tmp_path, tiny_corpus, *ways)
    assert other == []
    assert problems(joined, one(*ADAMW, steps=5)) == []


@pytest.mark.full
@pytest.mark.slow
def test_it_holds_for_compiled_layers(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: References) -> None:
    world, parallel = LAYOUTS["tp2-ep2-etp2"]
    settings = (*ADAMW, "model.experts.shared=1")
    found = train(ranks, tmp_path, tiny_corpus, world, "compiled", MODEL, *settings, parallel, "compile=on")
    assert problems(found, one(*settings)) == []


# Which rank holds what ------------------------------------------------------------------------------------------------


def layout(world: int, **parallel: Any) -> Layout:
    return make_layout(Parallel(**parallel), Model(), world)


def test_ranks_with_the_same_part_of_an_expert_are_those_with_the_same_place_on_tp() -> None:
    split = layout(16, tp=2, cp=2, ep=4, etp=2, pp=1)
    assert split.expert_peers(0) == (0, 2, 4, 6)
    assert split.expert_peers(9) == (9, 11, 13, 15)
    assert split.expert_holders(0) == (0, 8)
    assert split.expert_holders(7) == (7, 15)
    whole = layout(16, tp=2, cp=2, ep=4)
    assert whole.expert_peers(0) == (0, 1, 2, 3)
    assert whole.expert_holders(0) == (0, 4, 8, 12)


def described(world: int, experts: Any = None, **parallel: Any) -> str:
    mesh = Mesh(one_process(0, world), layout(world, **parallel))
    return describe_dispatch(tiny_model(experts={"count": 4, **(experts or {})}), mesh)


def test_the_log_names_the_dispatch() -> None:
    assert described(2) == "sorted, no exchange, no host synchronisation"
    assert described(4, tp=2, ep=4).startswith("all-to-all over ep 4 (gloo), one exchange of counts and one host synchronisation")
    assert described(2, tp=2, etp=2) == "sorted, gathered over etp 2 (gloo), no host synchronisation"
    assert described(4, tp=2, ep=2, etp=2).endswith("a layer, then gathered over etp 2 (gloo)")
    by_capacity = described(2, {"capacity_factor": 1.0, "scope": "rank"}, ep=2)
    assert by_capacity.startswith("all-to-all over ep 2 (gloo), as many rows as the capacity lets pass, no host synchronisation")


BY_RANK = ("model.experts.scope=rank", "model.experts.capacity_factor=0.8")
OF_KNOWN_SIZE = {
    "ep2": ((2, "parallel={ep: 2, zero_stage: 0}"), (2, "parallel={zero_stage: 0}")),
    "tp2-ep2-etp2": (LAYOUTS["tp2-ep2-etp2"], (4, "parallel={tp: 2, zero_stage: 0}")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", full_unless(["ep2"], OF_KNOWN_SIZE))
def test_rows_padded_to_a_capacity_train_the_run_of_whole_experts(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, name: str
) -> None:
    """Each rank drops by its own tokens, so that the reference has as many ranks, which exchange no rows."""
    found, expected = (
        train(ranks, tmp_path, tiny_corpus, world, run, MODEL, *ADAMW, parallel, *BY_RANK)
        for run, (world, parallel) in zip(("found", "expected"), OF_KNOWN_SIZE[name], strict=True)
    )
    assert problems(found, expected) == []
    assert found.records[0]["moe/layer_00/dropped_share"] > 0.05


# One layer on some ranks ----------------------------------------------------------------------------------------------


def split_layer(rank: int, world: int, parallel: Parallel, model: Model) -> Experts:
    """Experts of which this rank holds what the layout says, cut from the same whole ones everywhere."""
    mesh = open_mesh(parallel, model, one_process(rank, world))
    torch.manual_seed(0)
    layer = Experts(model)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.router.start(0, 0)
    ep, etp = mesh.size("ep"), mesh.size("etp")
    mine, part = mesh.layout.expert_peers(rank).index(rank), mesh.along("tp").index(rank) if etp > 1 else 0
    with torch.no_grad():
        for name, dim in (("gate", 1), ("up", 1), ("down", 2)):
            whole = getattr(layer, name)
            setattr(layer, name, torch.nn.Parameter(whole.chunk(ep)[mine].chunk(etp, dim)[part].clone()))
    apply(torch.nn.ModuleList([layer]), model, mesh)
    return layer


def tokens(rank: int, number: int = 12) -> Tensor:
    return torch.randn(number, 1, 32, generator=torch.Generator().manual_seed(rank)).requires_grad_()


SYNCHRONISING = ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__", "nonzero")


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """The methods of tensors that bring values to the host, as they are called meanwhile."""
    found: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in SYNCHRONISING:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counted(name)))
        yield found


def synchronisations_of_a_layer(rank: int, world: int, parallel: Parallel, model: Model) -> list[str]:
    layer, x = split_layer(rank, world, parallel, model), tokens(rank)
    with synchronisations() as found:
        layer(x, origin(12))[0].sum().backward()
    return found


ONCE = ["tolist"]


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize(
    ("parallel", "scope", "expected"),
    [
        (Parallel(ep=2), "global", ONCE),
        (Parallel(ep=2), "rank", None),
        (Parallel(tp=2, etp=2), "global", []),
        (Parallel(tp=2), "global", []),
    ],
    ids=["ep", "ep, by rank", "etp", "tp"],
)
def test_counts_go_to_the_host_at_most_once_a_layer_forward_and_backward(
    ranks: RankPool, parallel: Parallel, scope: Any, expected: list[str] | None, capacity: float | None
) -> None:
    """With a capacity by each rank's own tokens not at all."""
    model = tiny_model(experts={"count": 4, "per_token": 2, "width": 16, "capacity_factor": capacity, "scope": scope})
    expected = (ONCE if capacity is None else []) if expected is None else expected
    assert ranks.run(synchronisations_of_a_layer, parallel, model, world_size=2) == [expected] * 2


def result_of_a_layer(rank: int, world: int, parallel: Parallel, model: Model, fused: bool) -> tuple[list[Tensor], set[str]]:
    """Output and gradients, and the operators that moved rows."""
    layer, x = split_layer(rank, world, parallel, model), tokens(rank)
    layer.fused = fused
    with torch.profiler.profile() as profile:
        out, _ = layer(x, origin(12))
        out.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    moved = {event.name.removeprefix("megascale::") for event in profile.events() or () if event.name.startswith("megascale::")}
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)], moved


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize(("parallel", "scope"), [(Parallel(ep=2), "rank"), (Parallel(tp=2, etp=2), "global")], ids=["ep", "etp"])
def test_kernels_move_the_same_rows_between_ranks(
    ranks: RankPool, parallel: Parallel, scope: Any, capacity: float | None
) -> None:
    """Their operators, as PyTorch: the kernels themselves need a GPU."""
    model = tiny_model(experts={"count": 4, "per_token": 2, "width": 16, "capacity_factor": capacity, "scope": scope})
    plain = ranks.run(result_of_a_layer, parallel, model, False, world_size=2)
    fused = ranks.run(result_of_a_layer, parallel, model, True, world_size=2)
    by_slots = {"take_rows_or_zeros"} if parallel.ep == 2 and capacity is not None else set()
    for (expected, before), (found, moved) in zip(plain, fused, strict=True):
        kernels = {"sort_copies", "write_copies", "sum_copies", "weighted_sum", "swiglu"} | by_slots
        assert (moved & kernels, before & kernels) == (kernels, {"sort_copies"})
        assert len(found) == len(expected) > 4
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def counts_taken_to_the_host(rank: int, size: int, settings: dict[str, Any]) -> int:
    """In the forward and backward passes of one step."""
    config = Config.model_validate(settings)
    parts = build_parts(config, one_process(rank, size))
    readers = parts.mesh.along("dp")
    batch = next(iter(step_batches(parts.data.train, config.batch, 1, 1, readers.index(rank), len(readers))))
    share = 1 / len(batch.micro_batches)
    with mock.patch.object(expert_exchange, "to_host", wraps=expert_exchange.to_host) as counted:
        scale = torch.tensor(1e-3)
        parts.stages.gradients(batch.micro_batches, [share] * len(batch.micro_batches), scale, parts.engine, lambda *_: None)
    return counted.call_count


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("layer", 1), ("stream", 2)])
@pytest.mark.parametrize("blocks", full_unless([2], [1, 2]))
def test_recomputation_takes_no_counts_to_the_host(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, recompute: str, times: int, blocks: int
) -> None:
    """Two streams, which `stream` runs one after the other; three of twelve layers are routed."""
    config = tiny_config(
        tmp_path, tiny_corpus, *ALL_AXES, "model.layers=12", "model.experts.every=4", f"model.altup.blocks={blocks}",
        "batch={sequences: 8, micro_batches: 2}", f"parallel={{ep: 2, recompute: {recompute}, zero_stage: 0}}",
    )  # fmt: skip
    assert ranks.run(counts_taken_to_the_host, config.model_dump(), world_size=2) == [3 * 2 * times] * 2


def order_of_a_layer(rank: int, world: int, model: Model, in_order: bool) -> tuple[list[str], list[Tensor]]:
    """What happened when, and the results; `in_order`: every transfer is over before anything else begins."""
    layer, x, events = split_layer(rank, world, Parallel(ep=2), model), tokens(rank), list[str]()
    start, wait, shared = Transfer.start, Transfer.wait, SwiGLU.forward

    def starts(transfer: Transfer, rows: Tensor, back: bool = False) -> Tensor:
        events.append("back starts" if back else "starts")
        arriving = start(transfer, rows, back)
        if in_order:
            assert transfer.work is not None
            transfer.work.wait()
        return arriving

    def waits(transfer: Transfer) -> None:
        events.append("waited for")
        if in_order:
            transfer.work = mock.Mock()
        wait(transfer)

    def computes(module: SwiGLU, rows: Tensor) -> Tensor:
        events.append("shared")
        module.down.weight.register_hook(lambda _: events.append("shared backward"))
        return shared(module, rows)

    with (
        mock.patch.object(Transfer, "start", starts),
        mock.patch.object(Transfer, "wait", waits),
        mock.patch.object(SwiGLU, "forward", computes),
    ):
        out, _ = layer(x, origin(12))
        out.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return events, [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def test_shared_experts_are_computed_while_rows_travel_and_nothing_else_changes(ranks: RankPool) -> None:
    model = tiny_model(experts={"count": 4, "per_token": 2, "width": 16, "shared": 1})
    overlapped = ranks.run(order_of_a_layer, model, False, world_size=2)
    plain = ranks.run(order_of_a_layer, model, True, world_size=2)
    for (events, found), (_, expected) in zip(overlapped, plain, strict=True):
        assert events == ["starts", "shared", "waited for", "back starts", "shared backward", "waited for"]
        assert len(found) == 9
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
