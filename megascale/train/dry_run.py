"""A run without a cluster: what each rank would hold, compute and send, found by one step of the real modules on meta tensors.

The world is torch's fake process group, so that mesh, sharding plan, exchange points, pipeline schedule and engine are those of a real run.
One rank of each pipeline rank runs in turn, its peers are like it. What only data could tell is assumed (`DryRun.assumed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed import fake_pg

from megascale.config.checks import check
from megascale.config.layout import V_SHAPED, pipeline_bubble, stage_count, zero_stage_of
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.data.batches import MicroBatch
from megascale.data.megatron import is_megatron
from megascale.data.open_data import OpenData
from megascale.model.accounting import active_parameters, flops_per_token, mean_visible_keys, parameters
from megascale.parallel.device import Device
from megascale.parallel.engine import Share
from megascale.parallel.ledger import Entry, Ledger
from megascale.parallel.mesh import DATA, Layout, Mesh, make_layout, open_mesh
from megascale.parallel.meta_memory import MetaMemory
from megascale.parallel.pipeline import Stages
from megascale.parallel.plain import PlainEngine, sum_in_fp32
from megascale.parallel.shard import named_parameters, whole_on_meta
from megascale.parallel.world import World
from megascale.parallel.zero_traffic import MOST_LIVE, zero_traffic
from megascale.train.build import build_stages, cast, open_run_data, with_vocabulary
from megascale.train.groups import optimizer_groups
from megascale.train.start import frozen_by, plan_start

BACKEND = "dry"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment of a step."""

    parameters: int
    gathered: int
    """weights that ZeRO 3 holds whole for a while"""
    gradients: int
    optimizer: int
    """fp32 masters and moments"""
    activations: int
    """everything else: activations of all micro-batches under way, their gradients, buffers of the pipeline"""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class RankReport:
    """One rank of a pipeline rank; the others of the same pipeline rank are like it."""

    rank: int
    layers: dict[int, list[int]]
    """layers by pipeline stage; several stages where the schedule has several a rank"""
    parameters: int
    """elements on the rank before ZeRO divides them"""
    memory: Memory
    sent: list[Entry]
    """in one step"""


@dataclass(frozen=True)
class DryRun:
    """What a run would be."""

    config: Config
    layout: Layout
    zero_stage: int
    bubble: float
    """share of a step in which a rank waits for others of the pipeline"""
    parameters: int
    active_parameters: int
    """that one token passes"""
    flops: float
    """model FLOPs of a step, all ranks together"""
    ranks: list[RankReport]
    assumed: list[str]
    warnings: list[str]


def dry_run(config_file: Path, overrides: Sequence[str], world: int) -> DryRun:
    """Check a config for a world and run one step of it without memory, data or peers. Writes nothing.

    Raises:
        InputError: as a real start on that many ranks would; a missing corpus only where model.vocab_size does not make it needless.
    """
    loaded = load_config(config_file, overrides)
    warnings = check(loaded, world)
    config, data = _open(resolve(loaded.config))
    start = plan_start(config)
    layout, zero = make_layout(config.parallel, config.model, world), zero_stage_of(config, world)
    first = dict.fromkeys(layout.sizes, 0)
    frozen = frozen_by(start, config.model)
    reports = [_run_rank(config, layout, layout.rank({**first, "pp": pp}), zero, frozen) for pp in range(layout.sizes["pp"])]
    length = document_length(data, config.data.sequence_length)
    keys = mean_visible_keys((length - 1) / 2, config.model)
    tokens = config.batch.sequences * config.data.sequence_length
    return DryRun(
        config,
        layout,
        zero,
        pipeline_bubble(config.parallel, config.batch.micro_batches),
        parameters(config.model).total,
        active_parameters(config.model),
        flops_per_token(config.model, keys, bool(frozen), math.ceil(length / config.model.altup.stride) / length) * tokens,
        reports,
        _assumed(config, data, length, zero),
        warnings,
    )


def _open(config: Config) -> tuple[Config, OpenData | None]:
    """The config with the vocabulary's size, and the data if there is any; without a corpus the config has to say how large it is."""
    there = any(Path(source.path).is_dir() or is_megatron(source.path) for source in config.data.sources)
    if there or config.model.vocab_size is None:
        return open_run_data(config)
    return with_vocabulary(config, config.model.vocab_size), None


def document_length(data: OpenData | None, sequence_length: int) -> float:
    """Mean tokens of a document as the model sees it, cut at the end of a sequence; without data documents fill their sequences."""
    if data is None or data.train.sources[0].sequences.attention == "causal":
        return sequence_length
    lengths = [s.sequences.split.length / max(len(s.sequences.split.starts), 1) for s in data.train.sources]
    mean = sum(length * weight for length, weight in zip(lengths, data.train.weights, strict=True)) / sum(data.train.weights)
    return min(mean, float(sequence_length))


def _assumed(config: Config, data: OpenData | None, length: float, zero: int) -> list[str]:
    where = "documents fill their sequences" if length == config.data.sequence_length else "documents have their mean length"
    notes = [f"{where}: {length:,.0f} tokens{'' if data else ' (no corpus was opened)'}"]
    if config.model.experts.count > 1:
        notes.append("every expert gets the same number of tokens")
    notes.append(
        "activations: as eager execution keeps them, without what fused kernels allocate inside; torch.compile keeps less"
    )
    if zero:
        notes.append(
            f"ZeRO {zero}: its memory and traffic (dp) are computed, without padding; gradients are whole until the last micro-batch"
        )
    if zero == 3:
        notes.append(
            f"ZeRO 3: at most {MOST_LIVE:.0e} elements are gathered at a time; where all fit, each is gathered once a step"
        )
    notes.append("not counted: sums of losses and counters for the record, validation, checkpoints")
    return notes


# One rank -------------------------------------------------------------------------------------------------------------


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[World]:
    """This process as one rank of a world without other processes: collectives return at once."""
    world = World(rank, size, Device(torch.device("meta"), BACKEND))
    if size == 1:
        yield world
        return
    if BACKEND not in dist.Backend.backend_list:  # torch's own registration leaves the meta device out
        dist.Backend.register_backend(BACKEND, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group(BACKEND, store=fake_pg.FakeStore(), rank=rank, world_size=size)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _run_rank(config: Config, layout: Layout, rank: int, zero: int, frozen: frozenset[str]) -> RankReport:
    with fake_world(rank, layout.world) as world:
        mesh = open_mesh(config.parallel, config.model, world)
        stages, engine = _build(config, mesh, frozen)
        micro_batches = fewest_micro_batches(config)
        memory, ledger = _step(stages, engine, mesh, micro_batches, zero == 0)
        entries = _scaled(ledger.entries(), config.batch.micro_batches, micro_batches)
        if zero:
            arithmetic = Ledger(mesh)
            zero_traffic(arithmetic, engine.trained, engine.placements, mesh, zero, config)
            entries += arithmetic.entries()
        layers = {stage: [int(name) for name in decoder.layers] for stage, decoder in stages.decoders.items()}
        kept = _kept(engine, mesh, zero)
        activations = memory.peak + (config.batch.micro_batches - micro_batches) * memory.now // micro_batches
        elements = sum(p.numel() for p in engine.parameters.values())
        return RankReport(
            rank, layers, elements, replace(kept, activations=activations), sorted(entries, key=lambda e: (e.axis, e.kind))
        )


def _build(config: Config, mesh: Mesh, frozen: frozenset[str]) -> tuple[Stages, PlainEngine]:
    """As `megascale.train.build.build`, not compiled, and with the plain engine also in ZeRO's place: for want of memory it never steps."""
    stages, parameters, placements = build_stages(config, mesh)
    everywhere = {name: p.ndim for name, p in named_parameters(whole_on_meta(config.model)).items()}
    groups = optimizer_groups(parameters.items(), config.optimizer, everywhere, frozen=frozen)
    weights = cast(parameters, config.precision)
    engine = PlainEngine(Share(groups, weights, parameters, placements), config.optimizer, mesh)
    if config.parallel.recompute == "stream" or zero_stage_of(config, mesh.world.size):  # as the run's engine does it
        sum_in_fp32(parameters.values())
    return stages, engine


def fewest_micro_batches(config: Config) -> int:
    """So many micro-batches show all that a step does: more are sent and computed likewise, and no more of them are under way at a time.

    1F1B has one a stage under way at most, the interleaved schedule and zero_bubble less than two rounds, those that go forth and back as
    many as they have stages; a pipeline of one rank has one.
    """
    micro_batches, parallel, pp = config.batch.micro_batches, config.parallel, config.parallel.pp
    if pp == 1 or parallel.schedule == "1f1b":
        return min(micro_batches, max(pp, 2))
    if parallel.schedule in V_SHAPED:
        return min(micro_batches, stage_count(parallel))
    rounds = max(1, micro_batches // pp)
    by_round = micro_batches // rounds
    return 2 * by_round if rounds > 2 and 2 * by_round // pp == 2 else micro_batches


def _step(stages: Stages, engine: PlainEngine, mesh: Mesh, micro_batches: int, reduces: bool) -> tuple[MetaMemory, Ledger]:
    """Forward and backward of a step, and the plain engine's reduction."""
    state = [*engine.parameters.values(), *engine.masters.values(), *engine.flats.values()]
    batch = _batch(stages.config, mesh.size("dp"))
    engine.overlap = reduces and engine.overlap
    memory, ledger = MetaMemory([*state, batch.tokens, batch.labels, batch.positions, batch.documents]), Ledger(mesh)
    scale = torch.empty((), device="meta")
    share = 1 / micro_batches
    with _no_vote(), memory, ledger:
        stages.gradients([batch] * micro_batches, [share] * micro_batches, scale, engine, lambda *_: None)
        if reduces:
            engine.reduce()
    return memory, ledger


def _batch(config: Config, data_ranks: int) -> MicroBatch:
    """One rank's part of a micro-batch."""
    sequences = config.batch.sequences // config.batch.micro_batches // data_ranks
    shape = (sequences, config.data.sequence_length)
    kinds = (torch.int64, torch.int64, torch.int64, torch.int32)
    return MicroBatch(*(torch.empty(shape, dtype=kind, device="meta") for kind in kinds))


def _no_vote() -> mock._patch | nullcontext:
    """Spare the pipeline's first step its vote whether shapes are known: it reads a received value. Before torch 2.12 there is none."""
    if not hasattr(schedules._PipelineSchedule, "_warmup_p2p"):
        return nullcontext()
    from torch.distributed.pipelining.stage import InferenceMode

    def known(_schedule: object, stages: Sequence, *_: object) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    return mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", known)


def _scaled(entries: Sequence[Entry], micro_batches: int, run: int) -> list[Entry]:
    """Entries of `run` micro-batches -> of all; the engine's do not depend on their number."""
    once = ("dp", "world")
    several = [e for e in entries if e.axis not in once]
    assert all(e.calls % run == 0 == e.volume % run for e in several), "micro-batches are alike"
    return [e for e in entries if e.axis in once] + [
        replace(e, calls=e.calls * micro_batches // run, volume=e.volume * micro_batches // run) for e in several
    ]


def _kept(engine: PlainEngine, mesh: Mesh, zero: int) -> Memory:
    """What stays in memory, by arithmetic: fp32 gradients; masters of what is not fp32; two moments of AdamW, one of Muon.

    ZeRO divides masters (AdamW's of fp32 parameters too, which DeepSpeed copies) and moments by the ranks that share them; stage 3
    parameters too.
    """
    moments = {name: 2 if group.optimizer == "adamw" else 1 for group in engine.groups for name in group.parameters}
    weights = gradients = optimizer = whole = 0
    for name, parameter in engine.parameters.items():
        shards = len(mesh.along(*DATA) if zero == 3 else engine.placements[name].sharded_over) if zero else 1
        size, trained = parameter.numel(), name in moments
        whole += size * parameter.element_size()
        weights += -(-size * parameter.element_size() // (shards if zero == 3 else 1))
        gradients += 4 * size * trained
        copied = parameter.dtype != torch.float32 or (zero > 0 and moments.get(name) == 2)
        optimizer += -(-4 * size * (copied + moments.get(name, 0)) // (shards if trained else 1))
    elements = sum(p.numel() for p in engine.parameters.values())
    gathered = whole * min(elements, MOST_LIVE) // elements if zero == 3 else 0
    return Memory(weights, gathered, gradients, optimizer, 0)
