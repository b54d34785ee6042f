"""The DeepSpeed engine: ZeRO 1, 2 and 3 train the run of one process, and their checkpoints are everybody's."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from layouts import ADAMW, SGD_LIKE, SPOILED, Result, problems, train
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.save import save_checkpoint
from megascale.config.errors import InputError
from megascale.config.schema import Config, Model, Optimizer, Parallel
from megascale.parallel.engine import Engine, OptimizerGroup
from megascale.parallel.mesh import open_mesh
from megascale.parallel.placement import Placement
from megascale.parallel.plain import PlainEngine
from megascale.parallel.zero import ZeroEngine
from megascale.parallel.zero_ranges import flat_rectangles
from ranks import RankPool
from runs import ALL_AXES, Run, environment, losses, one_process, tiny_config

# Small tensors, and those soon used again, stay whole on every rank by default: here all of them are cut, released at once, and gathered
# again a few at a time, ahead of their use.
CUT_ALL_SETTINGS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2000,
}
CUT_ALL = f"engine.deepspeed.zero_optimization={json.dumps(CUT_ALL_SETTINGS)}"
THREE_RANKS = "batch={sequences: 6, micro_batches: 2}"
TIED = "model.tie_embeddings=true"
LAYOUTS = {
    "zero1-dp2": (2, "parallel.zero_stage=1"),
    "zero2-dp2": (2, "parallel.zero_stage=2"),
    "zero3-dp2": (2, "parallel.zero_stage=3", CUT_ALL),
    "zero3-dp2-small-whole": (2, "parallel.zero_stage=3"),
    "zero3-dp4": (4, "parallel.zero_stage=3", CUT_ALL),
    "zero1-one-rank": (1, "parallel.zero_stage=1"),
    "zero3-one-rank": (1, "parallel.zero_stage=3", CUT_ALL),
    "zero1-tp4": (4, "parallel={zero_stage: 1, tp: 4}"),
    "zero1-tp2-dp2": (4, "parallel={zero_stage: 1, tp: 2}"),
    "zero2-tp2-ep2-dp2": (4, "parallel={zero_stage: 2, tp: 2, ep: 2}"),
    "zero1-tp2-ep4-dp2": (4, "parallel={zero_stage: 1, tp: 2, ep: 4}"),
    "zero3-tp2-dp2": (4, "parallel={zero_stage: 3, tp: 2}", CUT_ALL),
    "zero1-pp2-dp2": (4, "parallel={zero_stage: 1, pp: 2}"),
    "zero2-pp2-ep2-dp2": (4, "parallel={zero_stage: 2, pp: 2, ep: 2}"),
    "zero1-interleaved": (4, "parallel={zero_stage: 1, pp: 2, schedule: interleaved, virtual_stages: 2}"),
}
TIED_LAYOUTS = {
    "zero1-pp2-tp2": (4, "parallel={zero_stage: 1, pp: 2, tp: 2}"),
    "zero2-pp2-dp2": (4, "parallel={zero_stage: 2, pp: 2}"),
    "zero3-dp2": (2, "parallel.zero_stage=3", CUT_ALL),
}
FOUR_LAYERS = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
PLAIN = "parallel.zero_stage=0"


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> dict[str, Result]:
    """The runs of one process with the plain engine."""
    settings = {"adamw": ADAMW, "sgd": SGD_LIKE, "tied": (*ADAMW, TIED), "three": (*ADAMW, THREE_RANKS)}
    folder = tmp_path_factory.mktemp("one")
    return {name: train(ranks, folder, tiny_corpus, 1, name, FOUR_LAYERS, *some, PLAIN) for name, some in settings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], layout: str, optimizer: str
) -> None:
    world, *overrides = LAYOUTS[layout]
    settings = ADAMW if optimizer == "adamw" else SGD_LIKE
    found = train(ranks, tmp_path, tiny_corpus, world, layout, FOUR_LAYERS, *settings, *overrides)
    assert problems(found, one[optimizer]) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", TIED_LAYOUTS)
def test_tied_embeddings_get_the_gradients_of_both_ends(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], layout: str
) -> None:
    world, *overrides = TIED_LAYOUTS[layout]
    found = train(ranks, tmp_path, tiny_corpus, world, layout, FOUR_LAYERS, *ADAMW, TIED, *overrides)
    assert problems(found, one["tied"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_sums_over_three_ranks_too(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], stage: int
) -> None:
    """Three divides neither the parameters evenly nor a float exactly."""
    overrides = (THREE_RANKS, f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
    found = train(ranks, tmp_path, tiny_corpus, 3, "three", FOUR_LAYERS, *ADAMW, *overrides)
    assert problems(found, one["three"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_percent_on_one_gradient_is_found(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], stage: int
) -> None:
    overrides = (f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
    found = train(ranks, tmp_path, tiny_corpus, 2, "spoiled", FOUR_LAYERS, *ADAMW, *overrides, spoiled=True)
    wrong = problems(found, one["adamw"])
    assert any(line.startswith("step") for line in wrong)
    assert f"model/{SPOILED}" in wrong


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_bf16_trains_as_with_the_plain_engine(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, one: dict[str, Result], world: int
) -> None:
    """fp32 gradients and masters around bf16 weights, and fp32 islands, with the same tolerance as in fp32; validation runs in between."""
    common = (FOUR_LAYERS, *ADAMW, "precision=bf16", "validation={every: 1, sequences: 8}")
    plain = train(ranks, tmp_path, tiny_corpus, world, "plain", *common, PLAIN)
    for stage in (1, 2, 3):
        overrides = (f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
        found = train(ranks, tmp_path, tiny_corpus, world, f"zero{stage}", *common, *overrides)
        assert problems(found, plain) == []
        # masters start from the exact weights, not from the rounded ones
        assert all(torch.equal(weight, one["adamw"].start[name]) for name, weight in found.start.items())


def validated(rank: int, size: int, settings: dict[str, Any]) -> list[list[Any]]:
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.train()
    names = sorted(name for name in run.records[-1] if name.startswith("val/"))
    assert names
    return losses(run.records, *names)


def test_validation_sees_the_whole_weights(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    """Also under ZeRO 3, between the steps whose module order it has noted."""
    common = (*ALL_AXES, *ADAMW, "validation={every: 1, sequences: 8}", "schedule.steps=4")
    configs = [
        tiny_config(tmp_path, tiny_corpus, *common, *engine, f"run.name=run-{i}").model_dump()
        for i, engine in enumerate([(PLAIN,), ("parallel.zero_stage=3", CUT_ALL)])
    ]
    plain, zero = (ranks.run(validated, config, world_size=2)[0] for config in configs)
    for found, expected in zip(zero, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def parameter_dtypes(rank: int, size: int, settings: dict[str, Any]) -> dict[str, str]:
    engine = Run(Config.model_validate(settings), one_process(rank, size)).trainer.engine
    return {name: str(parameter.dtype) for name, parameter in engine.parameters.items()}


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_leaves_islands_in_fp32(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: int) -> None:
    config = tiny_config(tmp_path, tiny_corpus, *ALL_AXES, "precision=bf16", f"parallel.zero_stage={stage}")
    (dtypes, _) = ranks.run(parameter_dtypes, config.model_dump(), world_size=2)
    wide = {name for name, dtype in dtypes.items() if dtype == "torch.float32"}
    assert {dtype for name, dtype in dtypes.items() if name not in wide} == {"torch.bfloat16"}
    kinds = ("norm.weight", "router.weight", "residual.predict", "residual.correct")
    assert all(any(name.endswith(kind) for name in wide) for kind in kinds)
    assert all(name.endswith(kinds) for name in wide)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_frozen_trunk_keeps_its_exact_weights(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: int) -> None:
    """Here every trained parameter is bf16, so that no fp32 one comes first."""
    frozen = 'optimizer={lr: 0.01, groups: [{pattern: "*prefix_*"}, {pattern: "*", frozen: true}]}'
    common = (frozen, "precision=bf16")
    plain = train(ranks, tmp_path, tiny_corpus, 2, "plain", *common, PLAIN)
    overrides = (f"parallel.zero_stage={stage}", *(CUT_ALL,) * (stage == 3))
    found = train(ranks, tmp_path, tiny_corpus, 2, "zero", *common, *overrides)
    for name, weight in found.end.items():
        assert torch.equal(weight, found.start[name]) == ("prefix_" not in name)
    assert problems(found, plain) == []


# Checkpoints ----------------------------------------------------------------------------------------------------------


def all_tensors(path: Path) -> dict[str, Tensor]:
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.names()}


def resave(rank: int, size: int, settings: dict[str, Any]) -> None:
    """Loads the newest checkpoint of a run and saves what was loaded beside it."""
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.trainer.checkpoints = run.folder / "again"
    run.save()


def continue_on_rank(rank: int, size: int, settings: dict[str, Any]) -> list[list[Any]]:
    run = Run(Config.model_validate(settings), one_process(rank, size))
    run.train()
    return losses(run.records)


def adopt(folder: Path, name: str, source: str) -> None:
    """A new run that starts with the checkpoints of another."""
    (folder / "runs" / name).mkdir()
    shutil.copytree(folder / "runs" / source / "checkpoints", folder / "runs" / name / "checkpoints")


READERS = {
    "plain-1": (1, PLAIN),
    "plain-pp2": (2, "parallel={zero_stage: 0, pp: 2}"),
    "zero1-dp2": (2, "parallel.zero_stage=1"),
    "zero2-dp3": (3, "parallel.zero_stage=2"),
    "zero1-tp2-ep2-dp2": (4, "parallel={zero_stage: 1, tp: 2, ep: 2}"),
    "zero2-pp2-tp2": (4, "parallel={zero_stage: 2, pp: 2, tp: 2}"),
    "zero3-dp4": (4, "parallel.zero_stage=3", CUT_ALL),
    "zero3-tp2-dp2": (4, "parallel={zero_stage: 3, tp: 2}", CUT_ALL),
}
WRITERS = ("plain-1", "zero1-tp2-ep2-dp2", "zero3-dp4")
STATE = (*ALL_AXES, "precision=bf16", "batch={sequences: 12, micro_batches: 1}", "schedule.steps=3")


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "steps"), [*((writer, 2) for writer in WRITERS), ("zero1-tp2-ep2-dp2", 0)])
def test_any_engine_reads_any_other_bit_for_bit(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, writer: str, steps: int
) -> None:
    """Step 0 has no optimizer state yet."""
    world, *overrides = READERS[writer]
    train(ranks, tmp_path, tiny_corpus, world, "writer", *STATE, *overrides, steps=2)
    step = f"step-{steps:08d}"
    written = all_tensors(tmp_path / "runs" / "writer" / "checkpoints" / step)
    kinds = {name.split("/")[0] for name in written}
    assert kinds == ({"model"} | {"adamw.exp_avg", "adamw.exp_avg_sq", "adamw.step"} if steps else {"model"})
    for name, (size, *layout) in READERS.items():
        adopt(tmp_path, name, "writer")
        if steps == 0:
            shutil.rmtree(tmp_path / "runs" / name / "checkpoints" / "step-00000002")
        settings = tiny_config(tmp_path, tiny_corpus, *STATE, *layout, f"run.name={name}").model_dump()
        ranks.run(resave, settings, world_size=size)
        found = all_tensors(tmp_path / "runs" / name / "again" / step)
        assert found.keys() == written.keys()
        assert [key for key, tensor in written.items() if not torch.equal(found[key], tensor)] == []


@pytest.mark.slow
def test_a_run_goes_on_under_another_engine(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    """Loaded moments, steps and bf16 weights are used: the curve is that of the run that was never stopped."""
    common = (*STATE, *ADAMW, "schedule={warmup_steps: 0, shape: constant}")
    whole = train(ranks, tmp_path, tiny_corpus, 1, "whole", *common, PLAIN, steps=4).curve
    for writer in ("plain-1", "zero2-dp3"):
        world, *overrides = READERS[writer]
        first = train(ranks, tmp_path, tiny_corpus, world, writer, *common, *overrides, steps=2).curve
        for name in ("plain-1", "zero1-dp2", "zero3-dp4"):
            size, *layout = READERS[name]
            adopt(tmp_path, f"{writer}-{name}", writer)
            config = tiny_config(tmp_path, tiny_corpus, *common, "schedule.steps=4", *layout, f"run.name={writer}-{name}")
            (rest, *_) = ranks.run(continue_on_rank, config.model_dump(), world_size=size)
            for found, expected in zip([*first, *rest], whole, strict=True):
                assert found == pytest.approx(expected, rel=2e-3)  # bf16, other sums


# Hand-made models -----------------------------------------------------------------------------------------------------


class Uneven(nn.Module):
    """Some parameters get no gradient: `second` on all ranks but the first, `never` on any; `fixed` is frozen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second, self.never = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3)
        self.fixed = nn.Linear(5, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        hidden = self.first(self.fixed(x)).tanh()
        out = self.second(hidden)
        return hidden.sum() + (out if both else out.detach()).square().sum()


ENGINES = ["zero1", "zero2", "zero3", "zero3-cut-all"]


def hand_made(rank: int, size: int, kind: str, scale: float = 1.0) -> tuple[Uneven, PlainEngine | ZeroEngine]:
    """All weights are `scale` times those of the model."""
    model = Uneven()
    for parameter in model.parameters():
        parameter.data *= scale
    mesh = open_mesh(Parallel(), Model(), one_process(rank, size))
    parameters = dict(model.named_parameters())
    everyone = tuple(range(size))
    placements = {n: Placement(tuple(p.shape), (0,) * p.ndim, everyone, everyone) for n, p in parameters.items()}
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    groups = [
        OptimizerGroup("matrices", "adamw", 0.01, 0.5, {n: p for n, p in trained.items() if p.ndim == 2}),
        OptimizerGroup("vectors", "adamw", 0.03, 0.0, {n: p for n, p in trained.items() if p.ndim == 1}, new=True),
    ]
    weights = {n: p.detach() for n, p in parameters.items()}
    shared = (groups, weights, parameters, placements, Optimizer(eps=1e-5, clip=3.0), mesh)
    if kind == "plain":
        return model, PlainEngine(*shared)
    return model, ZeroEngine(
        model, *shared, int(kind[4]), {"zero_optimization": CUT_ALL_SETTINGS} if kind == "zero3-cut-all" else {}
    )


def hand_made_step(model: Uneven, engine: Engine, uneven: bool, rank: int, step: int) -> float:
    generator = torch.Generator().manual_seed(100 * step + rank)
    engine.begin()
    for micro_batch in range(2):
        engine.backward(model(torch.randn(4, 5, generator=generator), not uneven or rank == 0), last=micro_batch == 1)
    return engine.gradient_norm()


Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]


def pieces(engine: Engine) -> Pieces:
    return [(r.name, r.global_shape, r.offsets, r.tensor.clone()) for r in engine.rectangles()]


def assemble(parts: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' rectangles; NaN where nobody wrote, an error where two did."""
    whole: dict[str, Tensor] = {}
    for name, shape, offsets, piece in (piece for part in parts for piece in part):
        tensor = whole.setdefault(name, torch.full(shape, torch.nan))
        here = tensor[tuple(slice(a, a + b) for a, b in zip(offsets, piece.shape, strict=True))]
        assert here.isnan().all(), name
        here.copy_(piece)
    return whole


def uneven_steps(rank: int, size: int, kind: str, uneven: bool) -> tuple[list[float], Pieces]:
    model, engine = hand_made(rank, size, kind)
    norms = []
    for step in range(3):
        norms.append(hand_made_step(model, engine, uneven, rank, step))
        engine.step(1.0 - 0.2 * step)
    return norms, pieces(engine)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("size", [2, 3])
def test_a_parameter_without_gradient_on_some_ranks_counts_as_zeros(ranks: RankPool, size: int, kind: str) -> None:
    """ZeRO 3 wants all ranks to run the same modules forwards and backwards; one may still go unused everywhere."""
    uneven = not kind.startswith("zero3")
    expected, found = (ranks.run(uneven_steps, engine, uneven, world_size=size) for engine in ("plain", kind))
    assert all(norms == pytest.approx(expected[0][0], rel=1e-6) for norms, _ in found)
    whole, reference = (assemble([part for _, part in run]) for run in (found, expected))
    assert whole.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6)


def skipping(rank: int, size: int, kind: str, skip: bool) -> tuple[Pieces, Pieces, list[float]]:
    model, engine = hand_made(rank, size, kind)
    hand_made_step(model, engine, False, rank, 0)
    engine.step(1.0)
    before, norms = pieces(engine), []
    if skip:
        engine.begin()
        engine.backward(model(torch.full((4, 5), torch.inf if rank else 1.0), True), last=True)
        norms.append(engine.gradient_norm())
        engine.skip()
        engine.begin()
        engine.backward(model(torch.ones(4, 5), kind.startswith("zero3") or rank == 0), last=True)
        engine.skip()  # with the gradients not yet reduced
    after = pieces(engine)
    norms.append(hand_made_step(model, engine, False, rank, 1))
    engine.step(1.0)
    return before, after, [*norms, *(float(p[3].double().sum()) for p in pieces(engine))]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_skipped_step_changes_nothing(ranks: RankPool, kind: str) -> None:
    skipped, straight = (ranks.run(skipping, kind, skip, world_size=2) for skip in (True, False))
    for (before, after, numbers), (_, _, expected) in zip(skipped, straight, strict=True):
        assert all(torch.equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
        assert not math.isfinite(numbers[0])
        assert numbers[1:] == expected


def handed_on(rank: int, size: int, writer: str, kind: str, folder: str) -> list[float]:
    """The norms of a writer's second and third step, and those of another engine that loads its first one."""
    world = one_process(rank, size)
    model, engine = hand_made(rank, size, writer, scale=0.5)
    hand_made_step(model, engine, False, rank, 0)
    engine.step(1.0)
    save_checkpoint(Path(folder), 1, engine.rectangles(), {}, rank=rank, world=size, gather=world.gather, barrier=world.barrier)
    other, loaded = hand_made(rank, size, kind)
    loaded.load(CheckpointReader(Path(folder) / "step-00000001"))
    norms = []
    for one_model, one_engine in ((model, engine), (other, loaded)):
        for step in (1, 2):
            norms.append(hand_made_step(one_model, one_engine, False, rank, step))
            one_engine.step(1.0)
    return norms


@pytest.mark.parametrize("writer", ["plain", "zero1"])
@pytest.mark.parametrize("kind", ENGINES)
def test_trained_and_frozen_weights_are_those_of_the_checkpoint(ranks: RankPool, tmp_path: Path, kind: str, writer: str) -> None:
    for norms in ranks.run(handed_on, writer, kind, str(tmp_path), world_size=3):
        assert norms[2:] == pytest.approx(norms[:2], rel=1e-6)


def new_phase(rank: int, size: int, kind: str, folder: str, moments: bool) -> Pieces:
    """Two steps behind a checkpoint whose vectors and frozen matrix are not this phase's."""
    world = one_process(rank, size)
    model, engine = hand_made(rank, size, "plain", scale=0.5)
    hand_made_step(model, engine, False, rank, 0)
    engine.step(1.0)
    save_checkpoint(Path(folder), 1, engine.rectangles(), {}, rank=rank, world=size, gather=world.gather, barrier=world.barrier)
    model, engine = hand_made(rank, size, kind)
    new = {name for name, p in model.named_parameters() if name.endswith("bias") or name.startswith("fixed")}
    engine.load(CheckpointReader(Path(folder) / "step-00000001"), new=new, moments=moments)
    for step in (1, 2):
        hand_made_step(model, engine, False, rank, step)
        engine.step(1.0, new_scale=0.25 * step)
    return pieces(engine)


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("kind", ENGINES)
def test_new_parameters_keep_their_weights_and_warm_up_by_themselves(
    ranks: RankPool, tmp_path: Path, kind: str, moments: bool
) -> None:
    expected, found = (assemble(ranks.run(new_phase, engine, str(tmp_path), moments, world_size=2)) for engine in ("plain", kind))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def held(rank: int, size: int, settings: dict[str, Any]) -> dict[str, int]:
    """Elements of each parameter's optimizer state on this rank."""
    engine = Run(Config.model_validate(settings), one_process(rank, size)).trainer.engine
    counts = dict.fromkeys(engine.trained, 0)
    for partition in engine.cut.partitions:
        for segment in partition.segments:
            counts[segment.name] += segment.size
    return counts


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_are_sharded_over_the_ranks_with_the_same_experts(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: int, ep: int
) -> None:
    """With tp 2, more ranks than data-parallel ones (ep 1), as many, or none but the rank itself (ep 4): each element lies on one rank."""
    config = tiny_config(tmp_path, tiny_corpus, *ALL_AXES, f"parallel={{zero_stage: {stage}, tp: 2, ep: {ep}}}")
    counts = ranks.run(held, config.model_dump(), world_size=4)
    experts = config.model.experts
    gate, down = (f"layers.1.feed_forward.{name}" for name in ("gate", "down"))
    for name in (gate, down):
        assert sum(count[name] for count in counts) == experts.count * experts.width * config.model.width
    layers = [sum(n for name, n in count.items() if "feed_forward.gate" in name or ".up" in name) for count in counts]
    assert max(layers) <= 1.5 * sum(layers) / 4
    # a norm is on both tensor-parallel ranks, and on each of them cut over the data axes
    assert sum(count["norm.weight"] for count in counts) == 2 * config.model.width


# Small parts ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_flat_range_is_a_few_rectangles_in_order(sizes: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, math.prod(sizes)))
    stop = data.draw(st.integers(start, math.prod(sizes)))
    x = torch.arange(math.prod(sizes)).view(sizes)
    found = list(flat_rectangles(tuple(sizes), start, stop))
    elements = []
    for offsets, extents, first in found:
        piece = x[tuple(slice(a, a + b) for a, b in zip(offsets, extents, strict=True))].flatten().tolist()
        assert piece == list(range(first, first + math.prod(extents)))
        elements += piece
    assert elements == list(range(start, stop))
    assert len(found) <= max(2 * len(sizes) - 1, 1)


def refused(rank: int, size: int, passthrough: dict[str, Any], frozen: bool) -> str:
    model = nn.Linear(2, 2)
    mesh = open_mesh(Parallel(), Model(), one_process(rank, size))
    parameters = dict(model.named_parameters())
    placements = {n: Placement(tuple(p.shape), (0,) * p.ndim, (0,), (0,)) for n, p in parameters.items()}
    groups = [OptimizerGroup("all", "adamw", 0.1, 0.0, {} if frozen else parameters)]
    with pytest.raises(InputError) as error:
        ZeroEngine(model, groups, parameters, parameters, placements, Optimizer(), mesh, 1, passthrough)
    return str(error.value)


@pytest.mark.parametrize(
    ("passthrough", "frozen", "named"),
    [
        ({"zero_optimization": {"reduce_bucket_size": "small"}}, False, "reduce_bucket_size"),  # by DeepSpeed
        ({"zero_optimization": {"reduce_scatter": False}}, False, "engine.deepspeed.zero_optimization.reduce_scatter"),
        ({"communication_data_type": "bf16"}, False, "engine.deepspeed.communication_data_type"),
        ({}, True, "frozen"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(
    ranks: RankPool, passthrough: dict[str, Any], frozen: bool, named: str
) -> None:
    (text,) = ranks.run(refused, passthrough, frozen, world_size=1)
    assert named in text


ALONE = """
import sys
import torch
from torch import nn
from megascale.config.schema import Optimizer
from megascale.parallel.device import Device
from megascale.parallel.engine import OptimizerGroup
from megascale.parallel.mesh import alone
from megascale.parallel.placement import Placement
from megascale.parallel.zero import ZeroEngine

assert "deepspeed" not in sys.modules
model = nn.Linear(3, 2)
parameters = dict(model.named_parameters())
placements = {n: Placement(tuple(p.shape), (0,) * p.ndim, (0,), (0,)) for n, p in parameters.items()}
groups = [OptimizerGroup("all", "adamw", 0.1, 0.0, parameters)]
mesh = alone(Device(torch.device("cpu"), "gloo"))
engine = ZeroEngine(model, groups, parameters, parameters, placements, Optimizer(), mesh, STAGE, {})
engine.begin()
engine.backward(model(torch.ones(1, 3)).sum(), last=True)
engine.gradient_norm()
engine.step(1.0)
from deepspeed.comm import comm
assert comm.cdb.shm_comm_op is None
assert not engine.deepspeed.monitor.enabled
assert engine.deepspeed.gradient_clipping() == 0
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_comes_late_and_quietly_and_compiles_nothing(tmp_path: Path, stage: int) -> None:
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ALONE.replace("STAGE", str(stage))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
