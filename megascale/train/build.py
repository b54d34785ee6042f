"""From a resolved config to the parts of a run: data, model, engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from megascale.config.errors import InputError
from megascale.config.layout import SPLIT_BACKWARD, rank_of_stage, stage_count, stages_of_rank, zero_stage_of
from megascale.config.schema import Config, Model
from megascale.data.open_data import OpenData, open_data
from megascale.model.decoder import FP32_PARAMETERS, Decoder
from megascale.model.initialize import start_routers
from megascale.parallel.apply import apply, describe_dispatch
from megascale.parallel.deferred import WeightGradients, defer_weight_gradients
from megascale.parallel.engine import Engine, Share
from megascale.parallel.mesh import Mesh
from megascale.parallel.pipeline import Stages
from megascale.parallel.placement import Placement
from megascale.parallel.plain import PlainEngine, sum_in_fp32
from megascale.parallel.recompute import apply_recompute
from megascale.parallel.shard import cut, materialise, named_parameters, own_stages, shard, tie_ends, whole_on_meta
from megascale.parallel.stages import stage_layers
from megascale.parallel.zero_traffic import overlaps
from megascale.train.compiling import compile_layers
from megascale.train.fused import use_attention, use_kernels
from megascale.train.groups import check_patterns, optimizer_groups, trained_names
from megascale.train.inherit import inherit
from megascale.train.unigrams import unigram_counts


@dataclass(frozen=True)
class Parts:
    """What the training loop works with."""

    config: Config
    """resolved, with the vocabulary's size"""
    data: OpenData
    mesh: Mesh
    stages: Stages
    engine: Engine
    new: frozenset[str] = frozenset()
    """names of the parameters that the phase before, or the model that the run started from, did not have"""
    frozen: frozenset[str] = frozenset()
    """names of the parameters that the run keeps as they are because it trains only what is new"""


def open_run_data(config: Config) -> tuple[Config, OpenData]:
    """The data, and the config with the vocabulary's size filled in; see `with_vocabulary`."""
    data = open_data(config.data, config.run.seed, config.model.vocab_size)
    return with_vocabulary(config, data.vocab_size), data


def with_vocabulary(config: Config, size: int) -> Config:
    """The config that knows its vocabulary's size, and so all its parameters, of which the optimizer's patterns must match some.

    Raises:
        InputError: see `check_patterns`.
    """
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    if config.optimizer.groups:
        check_patterns(config.optimizer, _shapes(config.model))
    return config


def refuse_idle_ranks(trained: Collection[str], config: Config) -> None:
    """Refuse ranks of a pipeline on whose stages nothing is trained: DeepSpeed needs a parameter to step.

    Raises:
        InputError: names the stages; the same on all ranks.
    """
    pp, layers = config.parallel.pp, stage_layers(config)
    last = rank_of_stage(stage_count(config.parallel) - 1, config.parallel)
    for rank in range(pp):
        here = [layer for stage in stages_of_rank(rank, config.parallel) for layer in layers[stage]]
        beginnings = [f"layers.{layer}." for layer in here]
        tied = config.model.tie_embeddings and rank == last
        beginnings += ["embedding."] * (rank == 0 or tied) + ["norm.", "aggregator.", "head."] * (rank == last)
        if not any(name.startswith(tuple(beginnings)) for name in trained):
            reason = f"all parameters of pipeline rank {rank} (layers {', '.join(map(str, here))}) are frozen"
            remedy = f"continue with parallel.zero_stage=0, or with fewer pipeline ranks than parallel.pp={pp}"
            raise InputError("optimizer.groups", f"{reason}, and DeepSpeed needs one to train", remedy)


def start_at_zero(parameters: Mapping[str, nn.Parameter], names: Container[str]) -> None:
    """Zeros in place of these parameters' initial weights, as far as they are here."""
    for name, parameter in parameters.items():
        if name in names:
            parameter.detach().zero_()


def cast(parameters: Mapping[str, nn.Parameter], precision: str) -> dict[str, Tensor]:
    """Give parameters their precision, in place, and return the fp32 weights by global name: those of bf16 ones are copies (masters)."""
    weights: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        weights[name] = parameter.detach()
        if precision == "bf16" and not any(fnmatchcase(name, pattern) for pattern in FP32_PARAMETERS):
            parameter.data = parameter.detach().to(torch.bfloat16)
    return weights


def build_stages(config: Config, mesh: Mesh) -> tuple[Stages, dict[str, nn.Parameter], dict[str, Placement]]:
    """This rank's stages with their initial weights, its parameters by global name, and what of the global ones they are.

    On the meta device first: cut, shard, and only then memory and weights, so that no rank ever holds what is not its own.
    """
    decoders: dict[int, Decoder] = {}
    parameters: dict[str, nn.Parameter] = {}
    placements: dict[str, Placement] = {}
    later: dict[int, WeightGradients] = {}
    for stage in own_stages(config, mesh):
        decoder = whole_on_meta(config.model)
        cut(decoder, stage, config)
        placements |= (here := shard(decoder, mesh))
        materialise(decoder, here, config.run.seed, mesh.world.device.torch)
        apply(decoder, config.model, mesh, config.parallel.context)
        if config.parallel.pp > 1 and config.parallel.schedule in SPLIT_BACKWARD:
            later[stage] = defer_weight_gradients(decoder)
        apply_recompute(decoder, config.parallel.recompute, gathers=zero_stage_of(config, mesh.world.size) == 3)
        decoders[stage] = decoder
    tie_ends(decoders)
    for decoder in decoders.values():
        parameters |= named_parameters(decoder)
    return Stages(decoders, config, mesh, later), parameters, placements


def _balance_hash_tables(stages: Stages, data: OpenData, config: Config) -> None:
    """Draw the tables that balance by the corpora's frequencies; a resumed run reads its own from the checkpoint afterwards."""
    experts = config.model.experts
    if experts.count == 1 or experts.router != "hash" or experts.hash_map != "balanced":
        return
    assert config.model.vocab_size is not None
    counts = unigram_counts(data.train, config.model.vocab_size)
    for decoder in stages.modules():
        start_routers(decoder, config.run.seed, counts)


def build(
    config: Config,
    data: OpenData,
    mesh: Mesh,
    say: Callable[[str], None],
    before: Model | None = None,
    frozen: frozenset[str] = frozenset(),
) -> Parts:
    """Build this rank's part of the model, connected for the layout and compiled, and its engine.

    Args:
        config: of the phase; knows the vocabulary's size.
        before: the model of the phase before, or that the run started from; none for a new model.
        frozen: names of parameters that are not trained.
    """
    stages, parameters, placements = build_stages(config, mesh)
    _balance_hash_tables(stages, data, config)
    everywhere = {name: len(shape) for name, shape in _shapes(config.model).items()}
    heritage = inherit(before or config.model, config.model)
    start_at_zero(parameters, heritage.zeroed)
    new = heritage.new
    groups = optimizer_groups(parameters.items(), config.optimizer, everywhere, new, frozen)
    share = Share(groups, cast(parameters, config.precision), parameters, placements)
    zero = zero_stage_of(config, mesh.world.size)
    if zero:
        refuse_idle_ranks(trained_names(everywhere, config.optimizer, frozen), config)
    say(f"kernels: {use_kernels(stages.modules(), config.kernels, mesh.world.device.torch)}")
    if zero == 3 and config.compile == "auto":
        say("training eagerly: torch.compile would trace DeepSpeed's gathering of weights (ZeRO 3) in every layer")
    elif config.parallel.pp > 1 and config.parallel.schedule in SPLIT_BACKWARD and config.compile == "auto":
        say(f"training eagerly: torch.compile cannot trace gradients that {config.parallel.schedule} keeps for later")
    else:
        compile_layers(stages.modules(), config.compile, mesh.world.device.torch, say)
    if zero == 0:
        engine: Engine = PlainEngine(share, config.optimizer, mesh)
    else:
        engine = _zero_engine(stages, share, config, mesh, zero)
    if config.parallel.recompute == "stream":  # the streams' parts of a weight's gradient meet in one backward pass
        sum_in_fp32(parameters.values())
    say(f"engine: {f'DeepSpeed, ZeRO {zero}' if zero else 'plain torch (ZeRO 0)'}")
    say(f"attention: {use_attention(config, mesh.world.device.torch)}")
    if config.model.experts.count > 1:
        say(f"expert dispatch: {describe_dispatch(config.model, mesh)}")
    return Parts(config, data, mesh, stages, engine, new, frozen)


def _zero_engine(stages: Stages, share: Share, config: Config, mesh: Mesh, stage: int) -> Engine:
    # DeepSpeed takes seconds to import
    from megascale.parallel.shared_muon import ZeroMuonEngine
    from megascale.parallel.zero import ZeroEngine

    has_matrices = any(group.parameters for group in share.groups if group.optimizer == "muon")
    kind: type[ZeroMuonEngine] | type[ZeroEngine] = ZeroMuonEngine if has_matrices else ZeroEngine
    model = nn.ModuleList(stages.modules())
    return kind(model, share, config.optimizer, mesh, stage, config.engine.deepspeed, overlaps(config, mesh, stage))


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of all parameters, by global name."""
    return {name: tuple(p.shape) for name, p in named_parameters(whole_on_meta(model)).items()}
