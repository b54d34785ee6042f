"""Tiny training runs: their configs, and ways to run them in this process, on some ranks, or by the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.observe.metrics import Record
from megascale.parallel.device import Device
from megascale.parallel.mesh import open_mesh
from megascale.parallel.world import World
from megascale.train.build import Parts, build, open_run_data
from megascale.train.phases import train_phases
from megascale.train.run_folder import open_run_folder
from megascale.train.start import Start, frozen_by, open_start
from megascale.train.stopping import StopRequest
from megascale.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
ALL_AXES = (
    "model.streams={count: 2, prefix_tokens: 4}",
    "model.experts={count: 4, per_token: 2, width: 16}",
    "model.altup={blocks: 2}",
)
PATTERN = """
run: {{name: tiny, folder: {runs}}}
model: {{width: 32, layers: 2, heads: 4, kv_heads: 2, ffn_width: 64}}
data: {{sources: [{{path: {corpus}}}], sequence_length: 32}}
batch: {{sequences: 4}}
optimizer: {{lr: 0.01}}
schedule: {{steps: 6, warmup_steps: 2}}
compile: "off"
parallel: {{zero_stage: 0}}
validation: {{every: 0}}
checkpoint: {{every: 0}}
observe: {{wandb: {{mode: "off"}}}}
"""


def write_config(folder: Path, corpus: Path) -> Path:
    """The YAML file of a tiny run whose run folders lie below `folder`."""
    path = folder / "tiny.yaml"
    mine = folder / f"tiny-{os.getpid()}.yaml"  # ranks may share the folder, and none may read half a file
    mine.write_text(PATTERN.format(runs=folder / "runs", corpus=corpus))
    return mine.replace(path)


def tiny_config(folder: Path, corpus: Path, *overrides: str) -> Config:
    """That config with overrides, resolved."""
    return resolve(load_config(write_config(folder, corpus), overrides).config)


def one_process(rank: int = 0, size: int = 1) -> World:
    """The world of this process on the CPU."""
    return World(rank, size, Device(torch.device("cpu"), "gloo"))


def build_parts(config: Config, world: World | None = None, start: Start | None = None) -> Parts:
    """Data, model and engine of a run."""
    config, data = open_run_data(config)
    mesh = open_mesh(config.parallel, config.model, world or one_process())
    return build(config, data, mesh, lambda _: None, start.model if start else None, frozen_by(start, config.model))


class NoSignals(StopRequest):
    """A stop request that only the STOP file and the test itself make: handlers belong to the process."""

    def __init__(self, stop_file: Path):
        self.stop_file, self.level = stop_file, self.NONE


class Run:
    """A trainer ready to train, resumed if its folder holds a checkpoint, and its records. `change` may spoil its parts first."""

    def __init__(self, config: Config, world: World | None = None, change: Callable[[Parts], None] | None = None):
        world = world or one_process()
        self.folder = Path(config.run.folder) / config.run.name
        if world.rank == 0:
            open_run_folder(config)
        world.barrier()
        with ExitStack() as files:
            start = open_start(*open_run_data(config), world, self.folder, files)
            self._open(config, world, change, start)

    def _open(self, config: Config, world: World, change: Callable[[Parts], None] | None, start: Start | None) -> None:
        parts = build_parts(config, world, start)
        if change is not None:
            change(parts)
        self.records: list[Record] = []
        self.said: list[str] = []
        self.stop, self.stop_after = NoSignals(self.folder / "STOP"), 0
        self.trainer = Trainer(parts, world, self.folder, self, 1, self.said.append, start=start)

    def write(self, record: Record) -> None:
        """The sink of the run."""
        self.records.append(record)
        if record["step"] == self.stop_after:
            self.stop.level = self.stop.STOP

    def close(self) -> None:
        """Nothing to close."""

    def train(self) -> str:
        """Trains to the end; the reason for exit.json."""
        return self.trainer.run(self.stop)

    def save(self) -> None:
        """Saves a checkpoint of the step reached."""
        self.trainer._save()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The masters, as copies."""
        return {name: master.detach().clone() for name, master in self.trainer.engine.masters.items()}


class Collected:
    """A sink that keeps the records, with a stop request that it makes itself behind a step (0: never)."""

    def __init__(self, stop_file: Path, stop_after: int = 0):
        self.records: list[Record] = []
        self.stop, self.stop_after = NoSignals(stop_file), stop_after

    def write(self, record: Record) -> None:
        """Keep a record."""
        self.records.append(record)
        if record["step"] == self.stop_after:
            self.stop.level = self.stop.STOP

    def close(self) -> None:
        """Nothing to close."""


def train_tiny(config: Config, change: Callable[[Parts], None] | None = None) -> Run:
    """Trains a config in this process to its end."""
    run = Run(config, change=change)
    run.train()
    return run


def train_phases_on_rank(rank: int, size: int, settings: dict[str, Any], stop_after: int = 0) -> list[Record]:
    """All phases of a run on one rank, from where its folder stands; its records."""
    config, data = open_run_data(Config.model_validate(settings))
    world = one_process(rank, size)
    folder = Path(config.run.folder) / config.run.name
    if rank == 0:
        open_run_folder(config)
    world.barrier()
    seen = Collected(folder / "STOP", stop_after)
    mesh = open_mesh(config.parallel, config.model, world)
    with ExitStack() as files:
        start = open_start(config, data, world, folder, files)
        reason, _ = train_phases(config, data, mesh, folder, seen, 1, seen.stop, lambda _: None, start)
    assert reason == ("stop" if stop_after else "done")
    return seen.records


def losses(records: list[Record], *names: str) -> list[list[Any]]:
    """The named metrics of each record, by default the loss and the gradient norm."""
    return [[record[name] for name in names or ("train/lm_loss", "train/grad_norm")] for record in records]


def environment() -> dict[str, str]:
    """This process's environment with one thread and no launcher's variables."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"}
    return {name: value for name, value in os.environ.items() if name not in drop} | {"OMP_NUM_THREADS": "1"}


def start_pretrain(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """The real command, running."""
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(config), *overrides]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pretrain(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The real command, to its end."""
    process = start_pretrain(config, *overrides)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
