"""The ranks that load one model together, for evaluation or generation: their world, their layout, each one's part of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from megascale.checkpoint.tensors import WEIGHTS, Tensors
from megascale.config.errors import InputError
from megascale.config.fields import dotted
from megascale.config.layout import data_parallel_ranks
from megascale.config.layout_checks import layout_problems
from megascale.config.schema import Batch, Config, Guard, Optimizer, Parallel
from megascale.model.decoder import Decoder
from megascale.parallel.agreement import Claim
from megascale.parallel.apply import apply
from megascale.parallel.buffers import read_buffers
from megascale.parallel.device import choose_device
from megascale.parallel.mesh import Mesh, alone, open_mesh
from megascale.parallel.pipeline import Stages
from megascale.parallel.placement import Placement
from megascale.parallel.shard import cut, own_stages, shard, tie_ends, whole_on_meta
from megascale.parallel.world import World, end_world, start_world
from megascale.train.build import cast
from megascale.train.fused import use_attention, use_kernels

AXES = ("dp", "pp", "stream", "cp", "tp", "ep", "etp", "context")
"""What of `parallel` matters without a backward pass."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Team:
    """The ranks that load a model together, and its layout over them."""

    world: World
    parallel: Parallel

    @classmethod
    def of_one(cls) -> Team:
        """This process by itself."""
        return cls(World(0, 1, choose_device(0, 1)), Parallel())

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all."""
        return self.world.rank == 0

    def together(self, work: Callable[[], Result]) -> Result:
        """What each rank's `work` returns, which must not wait for other ranks.

        Raises:
            InputError: it failed on some rank; the same on all, told by one.
        """
        failure: InputError | None = None
        try:
            result = work()
        except InputError as error:
            failure = error
        failures = [found for found in self.world.gather(failure) if found is not None]
        if not failures:
            return result
        first = failures[0]
        first.told = not self.leads
        raise first

    def of_leader(self, work: Callable[[], Result]) -> Result:
        """What rank 0's `work` returns, on all ranks; a small thing. Errors as in `together`."""
        mine: Any = self.together(lambda: work() if self.leads else None)
        return self.world.broadcast(mine)


@contextmanager
def join_team(text: str | None, arguments: Mapping[str, object], check: Callable[[], None]) -> Iterator[Team]:
    """The processes that a launcher has started for one command, joined until the end of the block; without a launcher this one alone.

    Args:
        text: `--parallel`, a YAML mapping; none: all ranks are data-parallel.
        arguments: of the command, the same on all ranks.
        check: of these arguments; raises InputError.

    Raises:
        InputError: bad arguments, or ranks that do not fit together: told once.
    """
    try:
        check()
        parallel = read_parallel(text)
        claim = Claim({"settings": {name: str(value) for name, value in arguments.items()}})
    except InputError as error:
        claim = Claim(failure=error)
    world = start_world(Guard().timeout_seconds, claim)
    try:
        yield Team(world, parallel)
    finally:
        end_world(world)


def read_parallel(text: str | None) -> Parallel:
    """The layout that `--parallel` gives, for example ``{tp: 2, pp: 2}``.

    Raises:
        InputError: no mapping of axes to numbers.
    """
    example = 'for example --parallel "{tp: 2, pp: 2}"'
    try:
        given = yaml.safe_load(text) if text is not None else {}
    except yaml.YAMLError as error:
        raise InputError("--parallel", f"{text!r} is no YAML", f"give a mapping, {example}") from error
    if not isinstance(given, dict):
        raise InputError("--parallel", f"{text!r} is no mapping", f"give one, {example}")
    unknown = [str(name) for name in given if name not in AXES]
    if unknown:
        raise InputError("--parallel", f"{', '.join(unknown)}: nothing that a forward pass needs", f"axes: {', '.join(AXES)}")
    try:
        return Parallel(**given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{dotted(tuple(first['loc']))}: {first['msg'].lower()}, given {first['input']!r}"
        raise InputError("--parallel", reason, f"give numbers of ranks, {example}") from error


def check_layout(config: Config, team: Team, length: int) -> None:
    """Refuse a layout that the model, the number of ranks or the length of the sequences does not allow.

    Raises:
        InputError: lists what does not fit.
    """
    ranks = data_parallel_ranks(team.parallel, team.world.size) or 1
    batch = Batch(sequences=ranks * team.parallel.pp, micro_batches=team.parallel.pp)
    data = config.data.model_copy(update={"sequence_length": length})
    update = {"parallel": team.parallel, "batch": batch, "data": data, "optimizer": Optimizer()}
    problems = list(layout_problems(config.model_copy(update=update), team.world.size))
    if problems:
        started = f"{team.world.size} ranks were started" if team.world.size > 1 else "one process was started"
        lines = [f"{dotted(problem.path)}: {problem.reason}" for problem in problems]
        remedy = "`torchrun --nproc-per-node N -m megascale ...` starts N ranks; without --parallel all of them are data-parallel"
        raise InputError("--parallel", "\n  ".join([started, *lines]), remedy)


def open_stages(config: Config, tensors: Tensors, precision: str, team: Team) -> Stages:
    """This rank's part of a model for evaluation. Nothing is initialised first, and a tensor at a time is read, of it the part held here.

    Args:
        config: with the vocabulary's size.
        tensors: fp32 weights and buffers by global name.
        precision: of the weights in memory.
    """
    config = config.model_copy(update={"parallel": team.parallel, "precision": precision})
    mesh = open_mesh(team.parallel, config.model, team.world) if team.world.size > 1 else alone(team.world.device)
    decoders = {}
    for stage in own_stages(config, mesh):
        decoder = whole_on_meta(config.model)
        cut(decoder, stage, config)
        placements = shard(decoder, mesh)
        apply(decoder, config.model, mesh, team.parallel.context)
        weights = _read(decoder, placements, tensors, precision, mesh)
        decoder.load_state_dict(weights, strict=False, assign=True)
        if config.model.tie_embeddings and decoder.head is not None and decoder.embedding is not None:
            decoder.head.weight = decoder.embedding.weight  # assigning has given the embedding a parameter of its own
        decoders[stage] = decoder.eval().requires_grad_(False)
    tie_ends(decoders)
    use_kernels(list(decoders.values()), config.kernels, team.world.device.torch)
    use_attention(config, team.world.device.torch)
    return Stages(decoders, config, mesh)


def whole(decoder: Decoder, config: Config, world: World) -> Stages:
    """A decoder in evaluation mode as the only stage of a process that works alone, whatever layout it was trained in."""
    return Stages({0: decoder}, config.model_copy(update={"parallel": Parallel()}), alone(world.device))


def _read(
    decoder: Decoder, placements: Mapping[str, Placement], tensors: Tensors, precision: str, mesh: Mesh
) -> dict[str, Tensor]:
    """Parameters and buffers of a stage on this rank's device, by their names in it."""
    device, tied = mesh.world.device.torch, decoder.config.tie_embeddings
    found = {name: buffer.to(device) for name, buffer in read_buffers(decoder, tensors).items()}
    for name, parameter in decoder.named_parameters():
        everywhere = "embedding.weight" if tied and name == "head.weight" else name
        part = tensors.read(WEIGHTS + everywhere, placements[everywhere].offsets, tuple(parameter.shape))
        weight = {everywhere: nn.Parameter(part, requires_grad=False)}
        cast(weight, precision)
        found[name] = weight[everywhere].detach().to(device)
    return found
