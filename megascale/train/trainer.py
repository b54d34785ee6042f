"""The training loop: a step, its record, validation, checkpoints, and a clean end."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

import torch

from megascale.checkpoint.background import BackgroundSaver
from megascale.checkpoint.errors import SaveError
from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.load import open_newest
from megascale.checkpoint.retention import prune
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.tensors import ORIGIN
from megascale.config.phases import Span
from megascale.data.batches import MicroBatch
from megascale.data.prefetch import prefetch
from megascale.model.accounting import flops_per_token, hardware_flops_per_token, mean_visible_keys
from megascale.observe.sinks import Sink
from megascale.observe.throughput import peak_flops, throughput
from megascale.parallel.buffers import buffer_rectangles, load_buffers
from megascale.parallel.device import HostCopies
from megascale.parallel.world import World
from megascale.train.batch_stream import StepBatch, step_batches
from megascale.train.build import Parts
from megascale.train.inherit import inherit
from megascale.train.lease import LeaseLost
from megascale.train.profiling import StepProfiler
from megascale.train.quiet import quiet_prefixes
from megascale.train.recovery import Recovery
from megascale.train.schedule import lr_scale
from megascale.train.start import InheritedTensors, Start, describe
from megascale.train.stopping import StopRequest
from megascale.train.tally import Tally, move_biases
from megascale.train.validate import validate

Say = Callable[[str], None]
"""Prints one line for the user, on rank 0."""


@dataclass
class Progress:
    """What has been done so far; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    """loss tokens"""
    sequences: int = 0
    flops_total: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Trainer:
    """Trains one phase: from the newest checkpoint, which may be of the phase before, to the phase's last step."""

    def __init__(
        self,
        parts: Parts,
        world: World,
        folder: Path,
        sink: Sink,
        lineage: int,
        say: Say,
        span: Span | None = None,
        start: Start | None = None,
    ):
        self.span = span or Span(0, 0, parts.config)
        self.record = start.record if start is not None else None
        self.parts, self.world, self.folder, self.sink, self.lineage, self.say = parts, world, folder, sink, lineage, say
        self.config, self.engine, self.stages, self.mesh = parts.config, parts.engine, parts.stages, parts.mesh
        self.peak_flops = peak_flops(world.device.name())
        self.checkpoints = folder / "checkpoints"
        self.found: list[str] = []
        gather = world.gather_aside if parts.config.checkpoint.background else world.gather
        self.saver = BackgroundSaver(world.rank, world.size, gather, HostCopies(world.device).of)
        self.saving_seconds = 0.0
        self.recovery = Recovery()
        self.progress = self._resume(start)

    def _resume(self, start: Start | None) -> Progress:
        reader = open_newest(self.checkpoints, self.world.rank, self.world.broadcast, self.say)
        if reader is None:
            if start is not None:
                self._take_over(start)
            return Progress()
        saved = reader.state
        self.record = saved.get(ORIGIN)
        progress = Progress(**saved["progress"])
        self.recovery = Recovery(**saved.get("recovery", {}))
        load_buffers(self.stages.decoders, reader)
        if self.span.number > 0 and progress.step == self.span.before:
            self.engine.load(reader, new=self.parts.new, moments=not self.span.reset_optimizer)
            self.recovery.begin(progress.tokens)
            self.say(f"phase {self.span.number} begins behind {reader.path.name}; {len(self.parts.new)} tensors are new")
            self._quieten(self.parts.new, progress.step + 1)
        else:
            self.engine.load(reader)
            self.say(f"resuming from {reader.path.name}")
        if saved["data_digest"] not in (None, self.parts.data.digest):  # imported weights know no corpora
            self.say("warning: the corpora are not those that the checkpoint was trained on")
        return progress

    def _take_over(self, start: Start) -> None:
        """Begin with another model's weights; what is new in this one keeps its own."""
        assert start.tensors is not None, "a run without checkpoints needs the model it starts from"
        heritage = inherit(start.model, self.config.model)
        tensors = InheritedTensors(start.tensors, heritage)
        load_buffers(self.stages.decoders, tensors, heritage.taken)
        self.engine.load(tensors, new=heritage.new, moments=False)
        self._quieten(heritage.new, 1)
        self.recovery = Recovery(list(start.recent))
        self.recovery.begin(0)
        for line in describe(start, heritage, self.config.model):
            self.say(line)

    def _quieten(self, new: Collection[str], step: int) -> None:
        """Streams are new on a trained trunk: see `megascale.train.quiet`."""
        if self.config.model.streams.prefix_start == "quiet" and any(".prefix_" in name for name in new):
            quiet_prefixes(self.parts, step)

    def run(self, stop: StopRequest) -> str:
        """Train until the phase is done, or stopped; returns the reason for exit.json.

        Raises:
            LeaseLost: another job has the run folder now.
        """
        config, steps = self.config, self.span.last
        profiler = StepProfiler(config.profile, self.folder / "logs", self.world.rank)
        readers = self.mesh.along("dp")
        batches = step_batches(
            self.parts.data.train,
            config.batch,
            self.progress.step + 1,
            steps,
            readers.index(self.world.rank),
            len(readers),
        )
        stacks = (self.folder / "logs" / f"stacks-rank-{self.world.rank}.txt").open("a")
        with prefetch(batches) as prefetched, stacks, self.saver:
            level = StopRequest.NONE
            while self.progress.step < steps and level == StopRequest.NONE:
                self._watch(stacks)
                step = self.progress.step + 1
                profiler.before(step)
                record = self._step(prefetched)
                profiler.after(step)
                if config.validation.every and (step % config.validation.every == 0 or step == steps):
                    self._watch(stacks)
                    record |= validate(self.stages, self.parts.data, config, self.mesh)
                self.sink.write(record)
                level = self._agreed(stop.poll(self.world.rank))
                self._watch(stacks)
                if level == StopRequest.LOST:
                    raise LeaseLost(self.folder)
                if level or step == steps:
                    self._save()
                elif config.checkpoint.every and step % config.checkpoint.every == 0:
                    self._try_to_save()
            faulthandler.cancel_dump_traceback_later()
        if self.progress.step == steps:
            return "done"
        return "requeue" if level == StopRequest.REQUEUE else "stop"

    def _watch(self, stacks: TextIO) -> None:
        """From now on: if the next part takes longer than the guard allows, write all stacks and end the process."""
        faulthandler.dump_traceback_later(self.config.guard.timeout_seconds, exit=True, file=stacks)

    def _agreed(self, level: int) -> int:
        """The highest stop level of any rank, so that all ranks stop at the same step."""
        flags = torch.zeros(StopRequest.LOST + 1)
        flags[level] = 1
        return max(i for i, count in enumerate(self.world.sum(flags).tolist()) if count)

    def _step(self, batches: Iterator[StepBatch]) -> dict[str, float | int | str]:
        """One optimizer step and its metrics record."""
        started = time.perf_counter()
        batch: StepBatch = next(batches)
        data_seconds = time.perf_counter() - started
        counts = self.mesh.sum(self._counts(batch.micro_batches), "dp")
        loss_tokens, (positions, kept, all_tokens) = counts[:-3], counts[-3:].tolist()
        step_tokens = int(loss_tokens.sum())
        tally = self._gradients(batch, (loss_tokens / step_tokens).tolist(), step_tokens)
        norm = self.engine.gradient_norm()
        scale, new_scale = self._learning_rates(batch.step - self.span.before)
        finite = self._update(norm, scale, new_scale)
        metrics = tally.record()
        if finite:
            move_biases(self.stages.modules(), tally.loads)
        self.world.device.synchronize()
        seconds = time.perf_counter() - started

        keys = mean_visible_keys(positions / all_tokens, self.config.model)
        frozen, kept = bool(self.parts.frozen), kept / all_tokens
        flops = flops_per_token(self.config.model, keys, frozen, kept) * step_tokens
        mode = self.config.parallel.recompute
        flops_hardware = hardware_flops_per_token(self.config.model, keys, mode, frozen, kept) * step_tokens
        flops_full = flops_per_token(self.config.model, float(self.config.data.sequence_length), frozen, kept) * step_tokens
        progress = self.progress
        progress.step, progress.sequences = batch.step, batch.consumed
        progress.tokens += step_tokens
        progress.flops_total += flops
        self._guard(finite, norm)
        return {
            "lineage": self.lineage,
            "step": batch.step,
            "phase": self.span.number,
            "tokens": progress.tokens,
            "flops_total": progress.flops_total,
            "sequences": progress.sequences,
            **metrics,
            "train/grad_norm": norm,
            **{f"optim/lr/{g.name}": g.lr * scale * (new_scale if g.new else 1.0) for g in self.engine.groups},
            **self.recovery.add(metrics["train/lm_loss"], progress.tokens),
            **throughput(seconds, step_tokens, flops, flops_full, flops_hardware, self.world.size, self.peak_flops),
            "perf/data_seconds": data_seconds,
            "perf/checkpoint_seconds": self._saving_seconds(),
            **self.world.device.memory(),
            **self.parts.data.train.progress(batch.consumed),
            "guard/skipped_steps": progress.skipped_steps,
        }

    def _counts(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Loss tokens of each micro-batch, the sum of positions, the tokens that strided layers keep (all without them), and all tokens;
        exact in fp64, so that no rank count changes them.
        """
        positions = sum(int(batch.positions.sum()) for batch in micro_batches)
        tokens = kept = sum(batch.tokens.numel() for batch in micro_batches)
        altup = self.config.model.altup
        if altup.form == "sequence":
            kept = sum(int((batch.positions % altup.stride == 0).sum()) for batch in micro_batches)
        return torch.tensor([*(batch.loss_tokens for batch in micro_batches), positions, kept, tokens], dtype=torch.float64)

    def _gradients(self, batch: StepBatch, shares: list[float], step_tokens: int) -> Tally:
        """Forward and backward of all micro-batches. The token losses are divided by the step's count, known before the first backward."""
        scale = torch.full((), 1 / step_tokens, device=self.world.device.torch)
        tally = Tally(self.config.model, self.mesh, self.stages.weights)
        self.stages.gradients(batch.micro_batches, shares, scale, self.engine, tally.add, batch.step)
        return tally

    def _learning_rates(self, step: int) -> tuple[float, float]:
        """Shares of the peak at a step counted from the start of the phase: of all groups, and on top of it of what the phase has added."""
        warmup = self.span.new_warmup_steps
        return lr_scale(step, self.config.schedule), min(step / warmup, 1.0) if warmup else 1.0

    def _update(self, norm: float, scale: float, new_scale: float) -> bool:
        """Step, or skip when the gradient is not finite; every rank sees the same norm."""
        finite = norm - norm == 0
        if finite:
            self.engine.step(scale, new_scale)
        else:
            self.engine.skip()
        return finite

    def _guard(self, finite: bool, norm: float) -> None:
        progress = self.progress
        progress.skipped_steps += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row >= self.config.guard.nonfinite_in_a_row:
            raise TrainingError(
                f"step {progress.step}: the gradient norm was {norm} for {progress.skipped_in_a_row} steps in a row; "
                "lower optimizer.lr, or restart from an earlier checkpoint by deleting the newer ones"
            )

    def _saving_seconds(self) -> float:
        """How long steps have waited for checkpoints since the last record."""
        seconds, self.saving_seconds = self.saving_seconds, 0.0
        return seconds

    def _try_to_save(self) -> None:
        """A checkpoint on the way. A full disk costs this one, not the run: the earlier ones stay, and the next one may fit again."""
        started = time.perf_counter()
        self._finish_save()
        if self.config.checkpoint.background:
            self.saver.start(self.checkpoints, self.progress.step, self._rectangles(), self._state(), self._prune)
        else:
            self._attempt(self.progress.step, self._save)
        self.saving_seconds += time.perf_counter() - started

    def _finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        self._attempt(self.saver.step, self.saver.wait)
        self._say_found()

    def _attempt(self, step: int | None, save: Callable[[], object]) -> None:
        try:
            save()
        except SaveError as error:
            self.say(f"warning: no checkpoint at step {step}, training goes on: {error}")

    def _save(self) -> None:
        """Now, without a copy: the last one, without which the run has failed, or one that may make steps wait."""
        self._finish_save()
        world = self.world
        save_checkpoint(
            self.checkpoints,
            self.progress.step,
            self._rectangles(),
            self._state(),
            rank=world.rank,
            world=world.size,
            gather=world.gather,
            barrier=world.barrier,
        )
        self._prune()
        self._say_found()

    def _say_found(self) -> None:
        """What pruning has found, in this thread."""
        for line in self.found:
            self.say(line)
        self.found.clear()

    def _rectangles(self) -> Iterator[Rectangle]:
        """What this rank writes into a checkpoint."""
        return chain(self.engine.rectangles(), buffer_rectangles(self.stages.decoders, self.mesh))

    def _state(self) -> dict[str, object]:
        """What a checkpoint says beside the tensors."""
        state: dict[str, object] = {
            "progress": asdict(self.progress),
            "recovery": asdict(self.recovery),
            "data_digest": self.parts.data.digest,
        }
        if self.record is not None:
            state[ORIGIN] = dict(self.record)
        return state

    def _prune(self) -> None:
        if self.world.rank == 0:
            checkpoint = self.config.checkpoint
            prune(self.checkpoints, checkpoint.keep_last, checkpoint.keep_every, self.found.append)
