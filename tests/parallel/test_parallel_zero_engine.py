"""The DeepSpeed engine by itself, with hand-made models; one test per rule."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from layouts import CUT_ALL_SETTINGS, full_unless
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.save import save_checkpoint
from megascale.config.errors import InputError
from megascale.config.schema import Config, Model, Optimizer, Parallel
from megascale.parallel.engine import Engine, OptimizerGroup, Share
from megascale.parallel.mesh import open_mesh
from megascale.parallel.placement import Placement
from megascale.parallel.plain import PlainEngine
from megascale.parallel.zero import ZeroEngine
from megascale.parallel.zero_ranges import flat_rectangles
from ranks import RankPool
from runs import ALL_AXES, Run, environment, one_process, tiny_config


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
    share, optimizer = Share(groups, weights, parameters, placements), Optimizer(eps=1e-5, clip=3.0)
    if kind == "plain":
        return model, PlainEngine(share, optimizer, mesh)
    passthrough = {"zero_optimization": CUT_ALL_SETTINGS} if kind == "zero3-cut-all" else {}
    return model, ZeroEngine(model, share, optimizer, mesh, int(kind[4]), passthrough, overlap=True)


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
        ZeroEngine(model, Share(groups, parameters, parameters, placements), Optimizer(), mesh, 1, passthrough, overlap=True)
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
from megascale.parallel.engine import OptimizerGroup, Share
from megascale.parallel.mesh import alone
from megascale.parallel.placement import Placement
from megascale.parallel.zero import ZeroEngine

assert "deepspeed" not in sys.modules
model = nn.Linear(3, 2)
parameters = dict(model.named_parameters())
placements = {n: Placement(tuple(p.shape), (0,) * p.ndim, (0,), (0,)) for n, p in parameters.items()}
groups = [OptimizerGroup("all", "adamw", 0.1, 0.0, parameters)]
mesh = alone(Device(torch.device("cpu"), "gloo"))
engine = ZeroEngine(model, Share(groups, parameters, parameters, placements), Optimizer(), mesh, STAGE, {}, True)
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


def build_and_forget(rank: int, size: int, settings: dict[str, Any]) -> None:
    Run(Config.model_validate(settings), one_process(rank, size))


def threads(rank: int, size: int) -> int:
    """Of this process: each process group that is left keeps some."""
    gc.collect()
    gc.collect()  # DeepSpeed's objects are free only behind the end of ours
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("stage", full_unless([0, 1], [0, 1, 3]))
def test_an_engine_that_is_no_longer_used_goes_away(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, stage: int) -> None:
    """With the model and the process groups: a phase must not keep the one before. Hooks on parameters could hold it for ever."""
    counts = []
    for number in range(4):
        settings = (*ALL_AXES, f"parallel.zero_stage={stage}", f"run.name=run-{number}")
        ranks.run(build_and_forget, tiny_config(tmp_path, tiny_corpus, *settings).model_dump(), world_size=2)
        counts.append(max(ranks.run(threads, world_size=2)))
    assert counts[3] == counts[1]
