"""The DeepSpeed engine: ZeRO 1, 2 and 3 (arXiv 1910.02054) under the trainer's `Engine` interface.

Only the `zero_*.py` files beside this one touch what DeepSpeed keeps inside. Of a step, DeepSpeed reduces gradients to their owners,
runs AdamW on each rank's part and gathers the weights; sums over tensor-parallel and tied holders, the norm and the clipping are ours,
because DeepSpeed knows only its data-parallel group.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.tensors import Tensors
from megascale.config.errors import InputError
from megascale.config.schema import Optimizer as OptimizerConfig
from megascale.parallel.charge import charged_to
from megascale.parallel.engine import OptimizerGroup, Share
from megascale.parallel.mesh import DATA, Mesh, Ranks
from megascale.parallel.zero_partition import CutAcross, CutEach, Partition, Segment
from megascale.parallel.zero_ranges import flat_rectangles
from megascale.parallel.zero_start import start_deepspeed
from megascale.parallel.zero_traffic import reduction_order

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state beside its count of steps."""


class ZeroEngine:
    """fp32 gradients, fp32 masters and AdamW sharded over the data-parallel ranks, for experts over those with the same experts.

    The model is run as it is, never through DeepSpeed's engine object, so that pipeline schedules may run it too. Gradients stay whole on
    each rank until the last micro-batch, at every stage: schedules run several backward passes at a time. Without a pipeline they are
    reduced while the last backward pass runs, in one order on all ranks, whatever order they become final in.
    """

    def __init__(
        self,
        model: nn.Module,
        share: Share,
        config: OptimizerConfig,
        mesh: Mesh,
        stage: int,
        passthrough: Mapping[str, Any],
        overlap: bool,
    ):
        """Args:
        model: holds all of this rank's parameters. With stage 3 they are whole here and cut now.
        share: all its groups are AdamW's. The weights of trained parameters are not kept.
        stage: 1, 2 or 3.
        passthrough: settings for DeepSpeed's config.
        overlap: reduce gradients while the last backward pass runs, in which each arises once (`zero_traffic.overlaps`).

        Raises:
            InputError: DeepSpeed refuses a setting or its version is too old, or no parameter here is trained.
        """
        assert stage in (1, 2, 3) and all(group.optimizer == "adamw" for group in share.groups)
        # without the parameters, which are about to get other memory
        weights = {name: weight.detach() for name, weight in share.weights.items()}
        self.groups, self.parameters, self.placements = share.groups, share.parameters, share.placements
        self.mesh, self.world, self.clip = mesh, mesh.world, config.clip
        self.trained = {name: p for group in self.groups for name, p in group.parameters.items()}
        if not self.trained:
            reason = f"every parameter on rank {self.world.rank} is frozen, and DeepSpeed needs one to train"
            raise InputError("optimizer.groups", reason, "continue with parallel.zero_stage=0, or with fewer pipeline stages")
        self.frozen = {name: weights[name] for name in self.parameters if name not in self.trained}
        data = mesh.along(*DATA)
        # ZeRO 3 gathers a parameter's parts over the data axes only, experts too
        self.shards = {name: data if stage == 3 else self.placements[name].sharded_over for name in self.trained}
        for parameter in self.trained.values():
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32
        self._find_peers()
        self._start(model, config, stage, passthrough, overlap)
        self._adopt(weights)
        self._order_gradients(overlap)

    def _find_peers(self) -> None:
        """Names of parameters by the ranks whose gradients have to be summed before ZeRO's reduction."""
        self.peers: dict[Ranks, list[str]] = {}
        for name in self.trained:
            holders, shards = self.placements[name].holders, self.shards[name]
            # a holder that I share no partition with is my peer if it stands where I stand on the data axes
            peers = tuple(rank for rank in holders if rank == self.world.rank or (rank not in shards and self._same_data(rank)))
            assert len(peers) * len(shards) == len(holders), f"{name}: its holders are no copies of those it is sharded over"
            if len(peers) > 1:
                self.peers.setdefault(peers, []).append(name)
        self.peers = dict(sorted(self.peers.items()))  # one order on all ranks, or they would wait for each other

    def _order_gradients(self, overlap: bool) -> None:
        """In which order DeepSpeed is given gradients, one on all ranks, and how many of them as soon as they are final."""
        self.order, self.early = reduction_order(self.trained, set(chain.from_iterable(self.peers.values())), overlap)
        self.last_micro_batch = self.begun = False
        self.waiting: set[str] = set()
        self.given = 0
        for name in self.order[: self.early]:
            self.trained[name].register_post_accumulate_grad_hook(partial(_tell, weakref.ref(self), name))

    def gradient_final(self, name: str) -> None:
        """This gradient is final in this backward pass."""
        if not self.last_micro_batch:
            return
        self.waiting.discard(name)
        with charged_to("dp", hidden=bool(self.waiting)):
            while self.given < self.early and self.order[self.given] not in self.waiting:
                self._give_next()

    def _give_next(self) -> None:
        self.cut.give(self.trained[self.order[self.given]])
        self.given += 1

    def _same_data(self, rank: int) -> bool:
        place, mine = self.mesh.layout.place(rank), self.mesh.place
        return all(place[axis] == mine[axis] for axis in DATA)

    def _start(
        self, model: nn.Module, config: OptimizerConfig, stage: int, passthrough: Mapping[str, Any], overlap: bool
    ) -> None:
        options: list[dict[str, Any]] = []
        self.option_groups: list[OptimizerGroup] = []
        shards: dict[Ranks, list[nn.Parameter]] = {}
        data = self.mesh.along(*DATA)
        for group in self.groups:
            by_kind: dict[tuple[torch.dtype, Ranks], list[nn.Parameter]] = {}
            for name, parameter in group.parameters.items():
                ranks = self.shards[name]
                by_kind.setdefault((parameter.dtype, ranks), []).append(parameter)
                if ranks != data:
                    shards.setdefault(ranks, []).append(parameter)
            for (_, ranks), members in by_kind.items():
                options.append({"params": members, "lr": group.lr, "weight_decay": group.weight_decay, "ranks": ranks})
                self.option_groups.append(group)
        self.deepspeed = start_deepspeed(model, options, config.betas, config.eps, shards, self.mesh, stage, passthrough, overlap)
        weakref.finalize(self, _remove_hooks, self.deepspeed.optimizer._grad_acc_hooks).atexit = False
        names = {id(parameter): name for name, parameter in self.trained.items()}
        self.cut: CutAcross | CutEach
        self.cut = CutEach(self.deepspeed, names, _tied(model)) if stage == 3 else CutAcross(self.deepspeed, names)
        self.adamw: torch.optim.Optimizer = self.deepspeed.optimizer.optimizer
        self.gradients: list[Tensor] = []

    @property
    def _partitions(self) -> list[Partition]:
        return self.cut.partitions

    @torch.no_grad()
    def _adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Masters start from the fp32 weights: DeepSpeed's are the rounded parameters."""
        for partition in self._partitions:
            for segment in partition.segments:
                if segment.name in weights:
                    mine = slice(segment.start, segment.start + segment.size)
                    segment.of(partition.master).copy_(weights[segment.name].reshape(-1)[mine])

    def begin(self) -> None:
        """See `Engine`."""
        self.cut.begin()
        self.begun, self.last_micro_batch, self.given = True, False, 0

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        self.expect(last)
        loss.backward()

    def expect(self, last: bool) -> None:
        """A backward pass is about to run; `last`: of the step."""
        self.last_micro_batch, self.waiting = last, set(self.order[: self.early])

    def _sum_over_holders(self) -> None:
        """Sum gradients over all holders; of the result each rank keeps its partition."""
        for name in self.order[self.given :]:
            if self.trained[name].grad is None:  # a rank that reduced fewer parameters than the others would pair them wrongly
                self.cut.zero_gradient(self.trained[name])
        for ranks, names in self.peers.items():
            gradients = [gradient for name in names if (gradient := self.trained[name].grad) is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            with charged_to("dp"):
                dist.all_reduce(flat, group=self.mesh.group(ranks))
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
        self._close()
        self.gradients = self.cut.gradients()

    def _close(self) -> None:
        """Reduce what is not reduced yet."""
        assert self.begun, "begin comes first"
        with charged_to("dp"):
            while self.given < len(self.order):
                self._give_next()
            self.cut.finish()
        self.begun = False

    def gradient_norm(self) -> float:
        """See `Engine`."""
        self.norm = self.reduce().sqrt().float()
        return float(self.norm)

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Reduce; the square of the global norm, in fp64, on the device: that of each rank's part, divided by the number of ranks with the
        same part, summed over the world.
        """
        self._sum_over_holders()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device.torch)
        for partition, flat in zip(self._partitions, self.gradients, strict=True):
            if partition.segments:
                # in fp64: see `plain.norm_of`
                norms = torch._foreach_norm([segment.of(flat) for segment in partition.segments], 2, torch.float64)
                total += sum(norm.square() / self._copies(s.name) for norm, s in zip(norms, partition.segments, strict=True))
        return self.world.sum(total)

    def _copies(self, name: str) -> int:
        """How many ranks have the same part of a parameter in their partitions."""
        return len(self.placements[name].holders) // len(self.shards[name])

    @torch.no_grad()
    def step(self, lr_scale: float, new_scale: float = 1.0) -> None:
        """See `Engine`."""
        if self.clip is not None:
            torch._foreach_mul_(self.gradients, (self.clip / self.norm).clamp(max=1.0))
        for torch_group, group in zip(self.adamw.param_groups, self.option_groups, strict=True):
            torch_group["lr"] = group.lr * lr_scale * (new_scale if group.new else 1.0)
        self.gradients = []
        with charged_to("dp"):
            self.deepspeed.step()

    def skip(self) -> None:
        """See `Engine`."""
        if self.begun:
            self._sum_over_holders()  # what was given to DeepSpeed already, it has to finish
        for parameter in self.trained.values():
            parameter.grad = None
        self.gradients = []
        self.cut.forget()

    @torch.no_grad()
    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self._adopt(weights)
        self.cut.publish()
        for name in weights.keys() & self.frozen.keys():
            self.frozen[name].copy_(weights[name])
            self.cut.set_frozen(self.parameters[name], weights[name])

    def _states(self, i: int) -> dict[str, Tensor]:
        """AdamW's state of a partition; empty before the first step."""
        return self.adamw.state.get(self.cut.master(i), {})

    def rectangles(self) -> Iterable[Rectangle]:
        """See `Engine`. Each rank writes its partition, if it is the first of those with the same."""
        for i, (name, weight) in enumerate(self.frozen.items()):
            placement = self.placements[name]
            if placement.holders[i % len(placement.holders)] == self.world.rank:
                yield Rectangle(f"model/{name}", placement.global_shape, placement.offsets, weight.detach())
        for i, partition in enumerate(self._partitions):
            states = self._states(i)
            for segment in partition.segments:
                placement = self.placements[segment.name]
                if placement.holders[0] not in self.shards[segment.name]:
                    continue
                yield from self._pieces("model", segment, partition.master)
                if not states:
                    continue
                for moment in MOMENTS:
                    yield from self._pieces(f"adamw.{moment}", segment, states[moment])
                if segment.start == 0 and not any(placement.offsets):
                    yield Rectangle(f"adamw.step/{segment.name}", (), (), states["step"])

    def _places(self, segment: Segment) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], slice]]:
        """A segment as rectangles of the global tensor: offsets, sizes, and where each lies in the partition."""
        placement = self.placements[segment.name]
        for offsets, sizes, first in flat_rectangles(self._sizes(segment.name), segment.start, segment.start + segment.size):
            place = segment.place + first - segment.start
            size = torch.Size(sizes).numel()
            yield tuple(a + b for a, b in zip(placement.offsets, offsets, strict=True)), sizes, slice(place, place + size)

    def _sizes(self, name: str) -> tuple[int, ...]:
        parameter = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _pieces(self, kind: str, segment: Segment, flat: Tensor) -> Iterator[Rectangle]:
        for offsets, sizes, where in self._places(segment):
            shape = self.placements[segment.name].global_shape
            yield Rectangle(f"{kind}/{segment.name}", shape, offsets, flat[where].view(sizes))

    @torch.no_grad()
    def load(self, reader: Tensors, new: Collection[str] = (), moments: bool = True) -> None:
        """See `Engine`.

        Raises:
            CheckpointError: a tensor is missing, or parameters that share a partition were stepped differently often.
        """
        has_state = moments and any(name.startswith("adamw.") for name in reader.names())
        for i, partition in enumerate(self._partitions):
            if any(name in new for name in partition.names):
                assert all(name in new for name in partition.names), "new parameters have groups of their own"
                continue
            master = self.cut.master(i)
            kinds = {"model": partition.master}
            if has_state:
                state = {moment: torch.zeros_like(partition.master) for moment in MOMENTS}
                self.adamw.state[master] = {"step": self._steps(reader, partition), **state}
                kinds |= {f"adamw.{moment}": flat for moment, flat in state.items()}
            else:
                self.adamw.state.pop(master, None)
            for segment in partition.segments:
                for offsets, sizes, where in self._places(segment):
                    for kind, flat in kinds.items():
                        flat[where].copy_(reader.read(f"{kind}/{segment.name}", offsets, sizes).reshape(-1))
        self.cut.publish()
        for name, weight in self.frozen.items():
            if name not in new:
                weight.copy_(reader.read(f"model/{name}", self.placements[name].offsets, tuple(weight.shape)))
                self.cut.set_frozen(self.parameters[name], weight)

    def _steps(self, reader: Tensors, partition: Partition) -> Tensor:
        """The number of steps, which a flat partition counts once for all its parameters."""
        steps = {name: float(reader.read(f"adamw.step/{name}")) for name in partition.names}
        if len(set(steps.values())) > 1:
            low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
            raise CheckpointError(
                str(reader.path),
                f"{low} was stepped {steps[low]:.0f} times and {high} {steps[high]:.0f} times, but ZeRO counts their steps together",
                "continue with parallel.zero_stage=0",
            )
        return torch.tensor(next(iter(steps.values())), device=partition.master.device)


def _tell(engine: weakref.ref[ZeroEngine], name: str, _parameter: Tensor) -> None:
    """A gradient is final; see `plain._tell`."""
    living = engine()
    if living is not None:
        living.gradient_final(name)


def _tied(model: nn.Module) -> bool:
    """Whether two modules share a parameter."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return len(names) > len(list(model.named_parameters()))


def _remove_hooks(hooks: Sequence[Any]) -> None:
    """DeepSpeed's hooks on the parameters would keep it, the model and the process groups for ever, as told in `plain._tell`. Its own
    `destroy` does more, and needs a process group.
    """
    for hook in hooks:
        hook.remove()
