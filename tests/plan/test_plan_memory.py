"""The plan's memory and FLOPs are those of the dry run: states to a thousandth, FLOPs exactly, activations to a tenth."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import full_unless
from megascale.plan.memory import Memory, rank_memory, worst_rank
from megascale.train.dry_run import dry_run
from plans import FINE, P2, P4, config_file, plan_of

COARSE = "model.experts={count: 16, per_token: 2, width: 2816, router: %s}"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp": (8, ()),
    "fp32": (8, ("precision=fp32", "parallel={tp: 2, recompute: layer}")),
    "fp32 blocks": (8, ("precision=fp32", "model.altup={blocks: 2}", "parallel={tp: 2}")),
    "tp": (8, ("parallel={tp: 4}", "model.qk_norm=true")),
    "layer": (8, ("parallel={tp: 4, recompute: layer}",)),
    "pp": (16, ("parallel={pp: 4, tp: 2}",)),
    "pp layer": (16, ("parallel={pp: 4, tp: 2, recompute: layer}",)),
    "interleaved": (16, ("parallel={pp: 4, tp: 2, schedule: interleaved, virtual_stages: 2}",)),
    "zero_bubble": (16, ("parallel={pp: 2, tp: 2, schedule: zero_bubble}",)),
    "zero_bubble v": (16, ("parallel={pp: 4, schedule: zero_bubble, virtual_stages: 2}", "model.vocab_size=4096")),
    "zbv": (16, ("parallel={pp: 4, tp: 2, schedule: zbv}",)),
    "dualpipev": (16, ("parallel={pp: 4, tp: 2, schedule: dualpipev}",)),
    "cp": (8, ("parallel={cp: 2, tp: 2}",)),
    "ulysses": (8, ("parallel={cp: 2, context: ulysses}",)),
    "streams": (8, (P4, "parallel={tp: 4}")),
    "streams apart": (8, (P4, "parallel={recompute: stream}")),
    "streams layer": (8, (P4, "parallel={recompute: layer}")),
    "stream": (8, (P4, "parallel={stream: 2}")),
    "network": (8, ("model.streams={count: 2, reparameterise: 512}",)),
    "streams pp": (16, (P2, "parallel={pp: 2, tp: 2}", "batch.micro_batches=16")),
    "blocks": (8, ("model.altup={blocks: 4}",)),
    "rebuilt": (16, ("model.altup={blocks: 4}", "model.layers=16", "parallel={pp: 2, tp: 2, recompute: layer}")),
    "predicted": (8, ("model.altup={blocks: 2, read: predicted}",)),
    "token": (8, ("model.altup={blocks: 2, coefficients: token}",)),
    "wide": (8, ("model.altup={blocks: 2, form: wide}",)),
    "sequence": (8, ("model.altup={form: sequence}",)),
    "experts": (8, (FINE,)),
    "ep": (8, (FINE, "parallel={ep: 8, tp: 2}")),
    "etp": (8, (FINE, "parallel={ep: 4, tp: 2, etp: 2}")),
    "ep layer": (8, (FINE, "parallel={ep: 4, recompute: layer}")),
    "every other": (8, ("model.experts={count: 32, per_token: 4, width: 1408, every: 2, offset: 1}", "parallel={ep: 4}")),
    "shared": (8, ("model.experts={count: 32, per_token: 4, width: 1408, shared: 1, router: sigmoid}", "parallel={ep: 4}")),
    "hash": (8, (COARSE % "hash", "parallel={ep: 8}")),
    "s_base": (8, (COARSE % "s_base", "parallel={ep: 8}")),
    "rl_r": (8, ("model.experts={count: 16, width: 2816, router: rl_r}", "parallel={ep: 8}")),
    "ep pp": (16, (FINE, "parallel={pp: 2, ep: 8, schedule: interleaved, virtual_stages: 2}")),
    "zero 0": (8, ("parallel={zero_stage: 0}",)),
    "zero 3": (8, ("parallel={zero_stage: 3, recompute: layer}",)),
    "muon": (8, ("optimizer={name: muon}", "parallel={zero_stage: 2}", FINE)),
    "tied": (8, ("model.tie_embeddings=true", "parallel={pp: 2}", "model.qkv_bias=true")),
    "large vocabulary": (8, ("model.vocab_size=131072", "parallel={tp: 4}")),
    "all axes": (
        16,
        (P2, "model.altup={blocks: 2}", "model.experts={count: 32, per_token: 2, width: 1408}", "parallel={ep: 4, tp: 2, pp: 2}"),
    ),
}
QUICK = ("dp", "layer", "pp", "streams", "blocks", "all axes")


@pytest.mark.parametrize("layout", full_unless(QUICK, LAYOUTS))
def test_memory_and_flops_are_those_of_the_dry_run(tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    found, plan = dry_run(config_file(tmp_path), overrides, world), plan_of(tmp_path, world, *overrides)
    assert plan.flops == found.flops
    assert (plan.parameters, plan.active_parameters) == (found.parameters, found.active_parameters)
    for rank, report in enumerate(found.ranks):
        memory = rank_memory(plan, rank)
        for part in ("parameters", "gathered", "gradients", "optimizer"):
            assert getattr(memory, part) == pytest.approx(getattr(report.memory, part), rel=1e-3), (part, rank)
        assert memory.activations == pytest.approx(report.memory.activations, rel=0.1), rank


def test_the_fullest_experts_need_more_than_an_even_share(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 8, FINE, "parallel={ep: 8}")
    even, skewed = rank_memory(plan, 0), rank_memory(plan, 0, imbalance=1.5)
    assert even.imbalance == 0
    # half again of the copies, and of the hidden states of the experts, in 8 layers of 4096 tokens
    assert skewed.imbalance == pytest.approx(0.5 * 8 * 4096 * 4 * 2 * (2048 + 4 * 1408), rel=0.05)
    assert skewed.activations == even.activations


def test_fragmentation_is_a_share_of_activations() -> None:
    memory = Memory(1, 0, 2, 3, 10, 0, 0.5)
    assert (memory.state, memory.total) == (6, 16.5)


def test_the_first_rank_of_1f1b_needs_most(tmp_path: Path) -> None:
    assert worst_rank(plan_of(tmp_path, 16, "parallel={pp: 4, tp: 2}"))[0] == 0
