"""A step's micro-batches through this rank's stages: one after the other, or by a pipeline schedule of torch.distributed.pipelining.

T tokens of a micro-batch on this rank, P streams, K blocks, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megascale.config.layout import rank_of_stage, stage_count
from megascale.config.schema import Config
from megascale.data.batches import MicroBatch
from megascale.model.attention import KeyValueCache
from megascale.model.decoder import Decoder, Losses, is_routed
from megascale.model.origin import Draw
from megascale.model.reinforce import NUMBERS
from megascale.model.routers import loss_weights
from megascale.parallel.deferred import WeightGradients
from megascale.parallel.engine import Engine
from megascale.parallel.mesh import Mesh

Observe = Callable[[Losses, float], None]
"""Sees the losses of a micro-batch on a stage, and the micro-batch's share of the step's loss tokens."""


SEVERAL_STAGES = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
"""torch's schedules that take a list of stages, by `parallel.schedule`."""
Schedule = Schedule1F1B | PipelineScheduleMulti


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, whose backward pass also differentiates `loss`: how a stage that is not the last adds its routers' losses."""
    return _AttachLoss.apply(x, loss)


class _Step:
    """What the stages need to know of the step under way."""

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        shares: Sequence[float],
        scale: Tensor,
        weights: Mapping[str, float],
        observe: Observe,
        draws: Sequence[Draw],
    ):
        self.micro_batches, self.shares, self.scale, self.weights, self.observe = micro_batches, shares, scale, weights, observe
        self.draws = draws

    def advance(
        self, decoder: Decoder, state: Tensor | None, number: int, policies: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One micro-batch through one stage: its state, or the loss [1] behind the last stage; both carry the routers' losses. With rl_r
        also the routers' policies, for the next stage.
        """
        micro, share = self.micro_batches[number].to(self.scale.device), self.shares[number]
        inputs = (micro.tokens, micro.positions, micro.documents, micro.labels, self.scale)
        state, losses = decoder.advance(state, *inputs, draw=self.draws[number], policies=policies)
        self.observe(losses, share)
        auxiliary = [value * (self.weights[name] * share) for name, value in losses.auxiliary.items()]
        auxiliary += [value * self.weights[name] for name, value in losses.rewarded.items()]
        if losses.lm is not None:
            return sum(auxiliary, losses.lm).reshape(1), None
        return (attach_loss(state, torch.stack(auxiliary).sum()) if auxiliary else state), losses.policies


def _the_loss(loss: Tensor, _target: Tensor) -> Tensor:
    """What torch's schedules ask for a loss function: the last stage has computed it already."""
    return loss


class _StageModule(nn.Module):
    """A stage as torch's schedules call it: the number of the micro-batch comes as a tensor, the tokens are read here."""

    def __init__(self, decoder: Decoder, stages: Stages):
        super().__init__()
        self.decoder, self.stages = decoder, stages

    def forward(self, state: Tensor, policies: Tensor | None = None, *, number: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stages = self.stages
        assert stages.step is not None
        first, last = self.decoder.embedding is not None, self.decoder.head is not None
        state, policies = stages.step.advance(self.decoder, None if first else state, int(number), policies)
        if last or not stages.has_policies:
            return state
        if policies is None:  # no routed layer so far
            policies = stages.empty_policies(state.shape[0], state.device)
        return state, policies


class Stages:
    """The decoder parts of this rank, by stage, and how micro-batches pass through them."""

    def __init__(
        self, decoders: Mapping[int, Decoder], config: Config, mesh: Mesh, later: Mapping[int, WeightGradients] | None = None
    ):
        """Args:
        decoders: by stage, first stage first.
        later: of the stages whose weight gradients wait (`megascale.parallel.deferred`).
        """
        self.decoders, self.config, self.mesh, self.later = decoders, config, mesh, later or {}
        self.count = stage_count(config.parallel)
        experts = config.model.experts
        self.weights = loss_weights(experts)
        self.has_policies = experts.count > 1 and experts.router == "rl_r"
        self.step: _Step | None = None
        self.schedules: dict[tuple[int, int], Schedule] = {}

    def modules(self) -> list[Decoder]:
        """The parts, first stage first."""
        return list(self.decoders.values())

    @property
    def is_last(self) -> bool:
        """Whether the last stage is on this rank."""
        return self.count - 1 in self.decoders

    def gradients(
        self,
        micro_batches: Sequence[MicroBatch],
        shares: Sequence[float],
        scale: Tensor,
        engine: Engine,
        observe: Observe,
        step_number: int = 0,
    ) -> None:
        """Forward and backward of all micro-batches of a step.

        Args:
            shares: of the step's loss tokens, by micro-batch; they weigh the routers' losses.
            scale: one over the step's loss tokens.
            observe: called once for each micro-batch and stage here.
            step_number: of the step in the run, for routers that draw.
        """
        step = _Step(micro_batches, shares, scale, self.weights, observe, self._draws(micro_batches, step_number))
        engine.begin()
        if self.mesh.size("pp") == 1:
            (decoder,) = self.modules()
            for number in range(len(micro_batches)):
                engine.backward(step.advance(decoder, None, number)[0], last=number == len(micro_batches) - 1)
            return
        self.step = step
        numbers = torch.arange(len(micro_batches))
        # the state argument is read by later stages alone, and those get it from the stage before
        schedule = self._schedule(len(micro_batches), micro_batches[0].tokens.numel())
        schedule.step(numbers, number=numbers, target=numbers, return_outputs=False)
        self.step = None

    def _draws(self, micro_batches: Sequence[MicroBatch], step_number: int) -> list[Draw]:
        """Where the draws of each micro-batch of this rank stand: its sequences are the rank's share of the global micro-batch."""
        readers = self.mesh.along("dp")
        first, sequences = readers.index(self.mesh.world.rank), micro_batches[0].tokens.shape[0]
        numbers = range(len(micro_batches))
        return [Draw(self.config.run.seed, step_number, (number * len(readers) + first) * sequences) for number in numbers]

    def _schedule(self, micro_batches: int, tokens: int) -> Schedule:
        key = (micro_batches, tokens)
        if key not in self.schedules:
            self.schedules.clear()  # they hold receive buffers: one size at a time
            stages: list[Any] = [self._stage(stage, decoder, tokens) for stage, decoder in self.decoders.items()]
            name = self.config.parallel.schedule
            if name == "1f1b":
                self.schedules[key] = Schedule1F1B(stages[0], micro_batches, _the_loss, scale_grads=False)
            else:
                self.schedules[key] = SEVERAL_STAGES[name](stages, micro_batches, _the_loss, scale_grads=False)
        return self.schedules[key]

    def _stage(self, stage: int, decoder: Decoder, tokens: int) -> PipelineStage:
        state = self._empty_state(tokens, "meta").requires_grad_()
        between = (state, self.empty_policies(state.shape[0], "meta")) if self.has_policies else (state,)
        # shapes are told, not found out: torch would run the model once more for that
        before = (torch.zeros(1, dtype=torch.int64, device="meta"),) if stage == 0 else between
        after = (torch.zeros(1, device="meta", requires_grad=True),) if stage == self.count - 1 else between
        device, group = self.mesh.world.device.torch, self.mesh.group(self.mesh.along("pp"))
        # a backward pass of such a stage is a whole one that leaves something over; torch's own way of splitting it is not used
        later = self.later[stage].take if stage in self.later else None
        return PipelineStage(_StageModule(decoder, self), stage, self.count, device, before, after, group=group, dw_builder=later)

    def _empty_state(self, tokens: int, device: torch.device | str) -> Tensor:
        model, dtype = self.config.model, torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        here, streams = tokens // self.mesh.size("cp") // self.mesh.size("tp"), model.streams.count // self.mesh.size("stream")
        shape = (here, streams, model.altup.blocks, model.width)
        return torch.empty(shape, dtype=dtype, device=device)

    def empty_policies(self, tokens: int, device: torch.device | str) -> Tensor:
        """Policies before the first routed layer, of this many tokens of this rank; with a gradient, as the schedules send one back."""
        model = self.config.model
        routed = sum(is_routed(layer, model) for layer in range(model.layers))
        streams = model.streams.count // self.mesh.size("stream")
        return torch.zeros(tokens, streams, routed, NUMBERS, device=device).requires_grad_()

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """The token losses [tokens of the batch] on the ranks of the last stage; none on the others."""
        device = self.mesh.world.device.torch
        here, one = batch.to(device), torch.ones((), device=device)

        def advance(_: int, decoder: Decoder, state: Tensor | None) -> Tensor:
            after, losses = decoder.advance(state, here.tokens, here.positions, here.documents, here.labels, one)
            if losses.token_losses is None:
                return after
            return decoder.join_context(decoder.join_losses(losses.token_losses))

        return self._pass(batch.tokens.numel(), advance)

    @torch.no_grad()
    def decode(self, tokens: Tensor, caches: Mapping[int, KeyValueCache]) -> Tensor | None:
        """Logits [B, V] behind the new tokens [B, m] of cached texts on the ranks of the last stage; none on the others.

        Args:
            caches: by stage; see `Decoder.decode`.
        """
        return self._pass(tokens.numel(), lambda stage, decoder, state: decoder.decode(tokens, caches[stage], state))

    def _pass(self, tokens: int, advance: Callable[[int, Decoder, Tensor | None], Tensor]) -> Tensor | None:
        """Forward through all stages; what `advance` makes of the last one, where it is."""
        pipeline, parallel = self.mesh.along("pp"), self.config.parallel
        state = None
        for stage, decoder in self.decoders.items():
            if stage > 0 and stage - 1 not in self.decoders:
                state = self._empty_state(tokens, self.mesh.world.device.torch)
                dist.recv(state, pipeline[rank_of_stage(stage - 1, parallel)], self.mesh.group(pipeline))
            state = advance(stage, decoder, state)
            if stage + 1 < self.count and stage + 1 not in self.decoders:
                dist.send(state.contiguous(), pipeline[rank_of_stage(stage + 1, parallel)], self.mesh.group(pipeline))
        return state if self.is_last else None

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of all parts."""
        for decoder in self.modules():
            decoder.train(mode)
