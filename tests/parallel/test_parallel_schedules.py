"""Zero-bubble schedules train the run of one process, and compute what 1F1B computes, to the bit and no more often: P=2, E=4, K=2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules
from torch.utils._python_dispatch import TorchDispatchMode

from layouts import ADAMW, Result, full_unless, layout_config, problems, train
from megascale.config.layout import pipeline_bubble, stage_count, stages_of_rank
from megascale.config.schema import Config, Parallel
from megascale.parallel.mesh import DATA
from megascale.parallel.pipeline import SEVERAL_STAGES
from megascale.train.batch_stream import step_batches
from ranks import RankPool
from runs import build_parts, one_process

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
BATCH = "batch={sequences: 16, micro_batches: 4}"
SETTINGS = (MODEL, *ADAMW, BATCH)
LAYOUTS = {
    "1f1b": (2, "{pp: 2, zero_stage: 0}"),
    "interleaved": (2, "{pp: 2, schedule: interleaved, virtual_stages: 2, zero_stage: 0}"),
    "zero_bubble": (2, "{pp: 2, schedule: zero_bubble, zero_stage: 0}"),
    "zero_bubble, two stages a rank": (2, "{pp: 2, schedule: zero_bubble, virtual_stages: 2, zero_stage: 0}"),
    "zbv": (2, "{pp: 2, schedule: zbv, zero_stage: 0}"),
    "dualpipev": (2, "{pp: 2, schedule: dualpipev, zero_stage: 0}"),
    "zero_bubble-tp2": (4, "{pp: 2, tp: 2, schedule: zero_bubble, zero_stage: 0}"),
    "zbv-tp2": (4, "{pp: 2, tp: 2, schedule: zbv, zero_stage: 0}"),
    "dualpipev-tp2": (4, "{pp: 2, tp: 2, schedule: dualpipev, zero_stage: 0}"),
    "zero_bubble-ep2-zero1": (4, "{pp: 2, ep: 2, schedule: zero_bubble, zero_stage: 1}"),
    "zbv-ep2-zero1": (4, "{pp: 2, ep: 2, schedule: zbv, zero_stage: 1}"),
    "dualpipev-ep2": (4, "{pp: 2, ep: 2, schedule: dualpipev, zero_stage: 0}"),
    "dualpipev-zero2": (4, "{pp: 2, schedule: dualpipev, zero_stage: 2}"),
    "zbv-pp4": (4, "{pp: 4, schedule: zbv, zero_stage: 0}"),
}
"""Name -> ranks, settings. dp is what is left of the world."""
SAME_STAGES = {
    "zero_bubble": "1f1b",
    "zero_bubble, two stages a rank": "interleaved",
    "zbv": "interleaved",
    "dualpipev": "interleaved",
}
"""Schedules, and an old one with as many stages."""


class Runs:
    """Each trained when first asked for."""

    def __init__(self, ranks: RankPool, folder: Path, corpus: Path):
        self.ranks, self.folder, self.corpus = ranks, folder, corpus
        self.results: dict[tuple[str, ...], Result] = {}

    def __call__(self, layout: str, *settings: str) -> Result:
        key = (layout, *settings)
        if key not in self.results:
            world, parallel = LAYOUTS.get(layout, (1, "{}"))
            given = (*SETTINGS, f"parallel={parallel}", *settings)
            self.results[key] = train(self.ranks, self.folder, self.corpus, world, f"run-{len(self.results)}", *given)
        return self.results[key]


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"), tiny_corpus)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", full_unless(["zero_bubble-tp2", "zbv-ep2-zero1", "dualpipev-ep2"], [n for n in LAYOUTS if n not in SAME_STAGES][2:])
)
def test_a_layout_trains_the_run_of_one_process(run: Runs, layout: str) -> None:
    settings = ("model.layers=8",) if layout == "zbv-pp4" else ()
    assert problems(run(layout, *settings), run("one", *settings)) == []


@pytest.mark.slow
@pytest.mark.parametrize("schedule", full_unless(["zero_bubble", "zbv", "dualpipev"], SAME_STAGES))
def test_it_is_the_run_of_the_old_schedule_to_the_bit(run: Runs, schedule: str) -> None:
    """Micro-batches and the uses of a weight are added in the same order. The norm that clips is not: a V's ranks sum other squares."""
    found, expected = run(schedule, "optimizer.clip=null"), run(SAME_STAGES[schedule], "optimizer.clip=null")
    assert all(torch.equal(weight, found.end[name]) for name, weight in expected.end.items())


OTHER_RUNS = {
    "tied embeddings on one rank, in two stages": ("zbv", ("model.tie_embeddings=true",)),
    "tied embeddings on one rank, ZeRO": ("zbv-ep2-zero1", ("model.tie_embeddings=true",)),
    "tied embeddings on two ranks": ("zero_bubble-tp2", ("model.tie_embeddings=true",)),
    "rewards that cross stages": ("zbv", ("model.experts.router=rl_r", "model.experts.per_token=1")),
    "rewards that cross stages, overlapped": ("dualpipev-tp2", ("model.experts.router=rl_r", "model.experts.per_token=1")),
    "validation": ("zbv-tp2", ("validation={every: 2, sequences: 19}",)),
    "recomputed layers": ("zbv", ("parallel.recompute=layer", "model.tie_embeddings=true")),
    "recomputed streams": ("dualpipev-ep2", ("parallel.recompute=stream",)),
    "shared experts, q/k norm and biases": (
        "zero_bubble",
        ("model.experts.shared=1", "model.qk_norm=true", "model.qkv_bias=true"),
    ),
    "frozen weights": (
        "zero_bubble",
        ("optimizer.groups=[{pattern: '*.attention.q.weight', frozen: true}, {pattern: embedding.weight, frozen: true}]",),
    ),
    "a growing batch": ("dualpipev", ("batch.ramp=[{steps: 1, sequences: 8}]",)),
}
OFTEN = ("tied embeddings on one rank, in two stages", "rewards that cross stages", "validation", "recomputed layers")


@pytest.mark.slow
@pytest.mark.parametrize("what", full_unless(OFTEN, OTHER_RUNS))
def test_it_holds_for(run: Runs, what: str) -> None:
    layout, settings = OTHER_RUNS[what]
    alone = tuple(setting for setting in settings if not setting.startswith("parallel."))
    assert problems(run(layout, *settings), run("one", *alone)) == []


class _Calls(TorchDispatchMode):
    """Counts what computes or travels: matrix products, attention, custom operators, collectives."""

    KINDS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot", "aten::_grouped_mm", "megascale::", "c10d::")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.name()
        if name.startswith(self.KINDS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(rank: int, size: int, settings: dict[str, Any]) -> Counter[str]:
    """Of the second step: in the first one the stages of a pipeline also get to know each other."""
    config = Config.model_validate(settings)
    parts = build_parts(config, one_process(rank, size))
    readers, engine = parts.mesh.along(*DATA), parts.engine
    found: Counter[str] = Counter()
    for batch in step_batches(parts.data.train, config.batch, 1, 2, readers.index(rank), len(readers)):
        count = len(batch.micro_batches)
        with _Calls() as calls:
            parts.stages.gradients(batch.micro_batches, [1 / count] * count, torch.tensor(1e-3), engine, lambda *_: None)
        engine.skip()
        found = calls.found
    return found


def calls_of_all_ranks(ranks: RankPool, folder: Path, corpus: Path, schedule: str, *settings: str) -> Counter[str]:
    config = layout_config(folder, corpus, "calls", *SETTINGS, f"parallel={LAYOUTS[schedule][1]}", "parallel.ep=2", *settings)
    return sum(ranks.run(calls_of_a_step, config.model_dump(), world_size=4), Counter())


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", pytest.param("layer", marks=pytest.mark.full)])
def test_nothing_is_computed_or_sent_twice(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, recompute: str) -> None:
    """torch's own way of splitting a backward pass runs forward what lies between its halves."""
    found = {
        name: calls_of_all_ranks(ranks, tmp_path, tiny_corpus, name, f"parallel.recompute={recompute}")
        for name in {*SAME_STAGES, *SAME_STAGES.values()}
    }
    for schedule, old in SAME_STAGES.items():
        calls, expected = found[schedule], found[old]
        assert calls["aten::mm"] > 0
        assert calls["megascale::exchange_rows"] > 0
        if schedule in ("zbv", "dualpipev"):  # the border at the bottom of the V is within a rank
            expected = expected - Counter({"c10d::send": 2 * 4 * 2, "c10d::recv_": 2 * 4 * 2})
        assert calls == expected


# The bubble ---------------------------------------------------------------------------------------------------------------


class _Stage:
    """What the constructors of torch's schedules read of a stage."""

    has_backward, is_first, submod, device, group_rank = True, False, None, "cpu", 0

    def __init__(self, index: int, parallel: Parallel):
        self.stage_index, self.num_stages, self.group_size = index, stage_count(parallel), parallel.pp
        self.is_last = index == self.num_stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}


def waiting(parallel: Parallel, micro_batches: int) -> float:
    """The share of a step in which rank 0 waits, if torch's order of actions is followed, and a forward pass of a stage, the gradients of
    its inputs and those of its weights take one unit of time each. Actions that torch overlaps count as one.
    """
    schedule: Any = SEVERAL_STAGES[parallel.schedule]([_Stage(i, parallel) for i in stages_of_rank(0, parallel)], micro_batches)
    left = {rank: [a for a in order if a is not None] for rank, order in schedule.pipeline_order.items()}
    done: dict[tuple[str, int, int], int] = {}
    clock, work = dict.fromkeys(left, 0), dict.fromkeys(left, 0)
    while any(left.values()):
        ready = [rank for rank, actions in left.items() if actions and all(d in done for d in needed(actions[0], parallel))]
        assert ready, "ranks wait for each other"
        for rank in ready:
            action = left[rank].pop(0)
            clock[rank] = max([clock[rank], *(done[d] for d in needed(action, parallel))])
            for part in action.sub_actions or (action,):
                length = 2 if part.computation_type == schedules.FULL_BACKWARD else 1
                clock[rank], work[rank] = clock[rank] + length, work[rank] + length
            for part in action.sub_actions or (action,):
                if part.computation_type != schedules.BACKWARD_WEIGHT:
                    done[kind(part), part.stage_index, part.microbatch_index] = clock[rank]
    return 1 - work[0] / max(clock.values())


def kind(action: Any) -> str:
    return "forward" if action.computation_type == schedules.FORWARD else "backward"


def needed(action: Any, parallel: Parallel) -> list[tuple[str, int, int]]:
    found = []
    for part in action.sub_actions or (action,):
        stage, number = part.stage_index, part.microbatch_index
        if kind(part) == "forward":
            found += [("forward", stage - 1, number)] * (stage > 0)
        elif part.computation_type != schedules.BACKWARD_WEIGHT:
            found += [("forward", stage, number)] + [("backward", stage + 1, number)] * (stage < stage_count(parallel) - 1)
    return found


@pytest.mark.parametrize("ranks_and_micro_batches", [(2, 4), (4, 8), (4, 16), (8, 32)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "interleaved", "virtual_stages": 2},
        {"schedule": "zero_bubble"},
        {"schedule": "zero_bubble", "virtual_stages": 2},
        {"schedule": "zbv"},
        {"schedule": "dualpipev"},
    ],
    ids=str,
)
def test_the_bubble_is_that_of_the_order_of_actions(settings: dict[str, Any], ranks_and_micro_batches: tuple[int, int]) -> None:
    pp, micro_batches = ranks_and_micro_batches
    parallel = Parallel.model_validate({**settings, "pp": pp})
    assert pipeline_bubble(parallel, micro_batches) == pytest.approx(waiting(parallel, micro_batches))
