"""The search yields layouts that the trainer accepts, none faster is left out, and what cannot work is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.errors import InputError
from megascale.config.layout_checks import contradictions, layout_problems
from megascale.config.schema import Config
from megascale.plan.cluster import load_cluster
from megascale.plan.layouts import Found, PlannedPart, candidates, describe, other_schedules, search
from megascale.plan.memory import worst_rank
from megascale.plan.rank import Plan
from megascale.plan.time import step_time
from plans import FINE, P2, P4, plan_of

H100 = load_cluster("h100")
MODELS = {
    "dense": (),
    "experts": (FINE,),
    "streams": (P2, "data.sequence_length=2048"),
    "blocks": ("model.altup={blocks: 2}", "data.sequence_length=2048"),
    "muon": ("optimizer={name: muon}",),
    "compiled": ("compile=on",),
}


def problems(config: Config) -> list[str]:
    """What the trainer's own checks say of a layout of 16 ranks."""
    return [problem.reason for problem in (*layout_problems(config, 16), *contradictions(config))]


def config_of(folder: Path, *overrides: str) -> Config:
    return plan_of(folder, 1, *overrides, "parallel={}").config


@pytest.mark.parametrize("model", MODELS)
def test_the_trainer_accepts_every_candidate(tmp_path: Path, model: str) -> None:
    config = config_of(tmp_path, *MODELS[model])
    found = list(candidates(config, H100, 16))
    assert len(found) > 30
    for candidate in found[:: max(1, len(found) // 200)]:
        assert problems(candidate) == [], describe(candidate, 16)
        for other in other_schedules(candidate):
            assert problems(other) == [], describe(other, 16)


def test_candidates_cover_the_axes(tmp_path: Path) -> None:
    found = list(candidates(config_of(tmp_path, FINE, P2), H100, 16))
    for axis in ("tp", "pp", "cp", "stream", "dp", "ep", "etp", "virtual_stages", "zero_stage", "recompute"):
        assert len({getattr(candidate.parallel, axis) for candidate in found}) > 1, axis
    assert len({candidate.batch.micro_batches for candidate in found}) > 1


def test_settings_of_deepspeed_ask_for_deepspeed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "engine.deepspeed={zero_optimization: {overlap_comm: false}}")
    assert 0 not in {candidate.parallel.zero_stage for candidate in candidates(config, H100, 16)}


def test_nothing_faster_is_left_out(tmp_path: Path) -> None:
    """Bounds leave out what could not have been among the best: trying all candidates, one by one, finds none faster."""
    config = config_of(tmp_path)
    best = search(config, H100, 16)
    fastest: dict[tuple[int, ...], float] = {}
    for candidate in candidates(config, H100, 16):
        plan = Plan(candidate, 16)
        rank, memory = worst_rank(plan, fragmentation=H100.efficiency.fragmentation)
        if memory.total <= H100.usable_bytes:
            found = Found(candidate, (PlannedPart(1000, plan, memory, rank, step_time(plan, H100)),))
            fastest[found.axes] = min(found.time.total, fastest.get(found.axes, found.time.total))
    times = [found.time.total for found in best.found]
    assert times == sorted(times)
    assert all(found <= there for found, there in zip(times, sorted(fastest.values()), strict=False))
    assert len({found.axes for found in best.found}) == len(best.found) == 10


def test_what_does_not_fit_is_not_found(tmp_path: Path) -> None:
    small = H100.model_copy(update={"memory_bytes": 12e9})
    found = search(config_of(tmp_path), small, 16).found
    assert all(one.memory.total <= small.usable_bytes for one in found)
    assert found[0].time.total > search(config_of(tmp_path), H100, 16).found[0].time.total


def test_a_model_too_large_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--gpus 1: none of .* layouts fits 2 GiB; the smallest needs \d+ GiB"):
        search(config_of(tmp_path), H100.model_copy(update={"memory_bytes": 5e9}), 1)


def test_gpus_that_no_batch_can_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--gpus 131: no layout works: 64 sequences a step"):
        search(config_of(tmp_path), H100, 131)


def test_a_slow_network_keeps_experts_in_a_node(tmp_path: Path) -> None:
    slow = H100.model_copy(update={"inter_node_bandwidth": 1e9})
    best = search(config_of(tmp_path, FINE), slow, 16).found[0]
    assert best.config.parallel.ep <= 8
    assert best.time.dp + best.time.pp + best.time.ep < best.time.total


PHASES = "schedule={phases: [{steps: 900, streams: 1, shape: constant}, {steps: 100}]}"


def test_a_layout_is_chosen_for_all_phases(tmp_path: Path) -> None:
    """It holds the largest phase, and no other has a shorter run; each phase takes what a run of it alone would."""
    found = search(config_of(tmp_path, P4, PHASES), H100, 16).found
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        assert one.config.parallel.stream == 1, "a phase has one stream"
        assert [part.steps for part in one.parts] == [900, 100]
        assert one.memory.total == max(part.memory.total for part in one.parts) <= H100.usable_bytes
        for part, streams in zip(one.parts, (1, 4), strict=True):
            alone = config_of(tmp_path, f"model.streams={{count: {streams}}}").model_copy(
                update={"parallel": one.config.parallel, "batch": one.config.batch}
            )
            assert part.time == step_time(Plan(alone, 16), H100) and part.plan.flops == Plan(alone, 16).flops
        assert one.seconds == pytest.approx(sum(part.steps * part.time.total for part in one.parts))


def test_a_phase_that_does_not_fit_leaves_a_layout_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, P4, PHASES)
    small = H100.model_copy(update={"memory_bytes": 24e9})
    for one in search(config, small, 16).found:
        assert worst_rank(Plan(one.config, 16), fragmentation=small.efficiency.fragmentation)[1].total <= small.usable_bytes
