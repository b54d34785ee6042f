"""One training run, from the command's arguments to exit.json."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config, Guard
from megascale.data.open_data import OpenData
from megascale.model.accounting import parameters
from megascale.observe.console import ConsoleSink, format_header, show
from megascale.observe.sinks import FanOut, JsonlSink, Sink, next_lineage
from megascale.observe.wandb_sink import open_wandb
from megascale.parallel.agreement import Claim, facts_of
from megascale.parallel.mesh import open_mesh
from megascale.parallel.world import World, end_world, rank_variables, start_world
from megascale.train.build import open_run_data
from megascale.train.launcher import LauncherWatch
from megascale.train.lease import LeaseLost, hold
from megascale.train.phases import train_phases
from megascale.train.run_folder import write_manifest
from megascale.train.shared_folder import open_shared_folder
from megascale.train.start import Start, open_start, recorded
from megascale.train.stopping import EXIT_CODES, StopRequest, write_exit
from megascale.train.trainer import Say


@dataclass(frozen=True)
class _Start:
    """What a rank finds out by itself."""

    config: Config
    data: OpenData
    warnings: list[str]


def train(config_file: Path, overrides: Sequence[str]) -> int:
    """Train the config, or go on where its run folder stands. Returns the process's exit code (see `stopping.EXIT_CODES`).

    Raises:
        InputError: bad input, on this rank or another; nothing has started, and no rank waits for another.
    """
    launcher = LauncherWatch()
    start = _prepare(config_file, overrides)
    if isinstance(start, _Start):
        world = start_world(start.config.guard.timeout_seconds, Claim(facts_of(start.config, start.data.digest)))
    else:
        world = start_world(Guard().timeout_seconds, Claim(failure=start))
    assert isinstance(start, _Start), "no world starts with a rank that cannot"
    try:
        folder = open_shared_folder(start.config, world)
        say = _speaker(world)
        for warning in start.warnings:
            say(f"warning: {warning}")
        if (folder / "STOP").exists():
            say(f"not starting: {folder / 'STOP'} exists; delete it to train")
            return write_exit(folder, "stop") if world.rank == 0 else 0
        with hold(folder, world, say) as lease:
            stop = StopRequest(folder / "STOP", launcher, lease)
            return _run(start.config, start.data, world, folder, say, stop)
    finally:
        end_world(world)


def _prepare(config_file: Path, overrides: Sequence[str]) -> _Start | Exception:
    """What this rank would train, or why it cannot: the other ranks have to learn either."""
    try:
        loaded = load_config(config_file, overrides)
        warnings = check(loaded, rank_variables(os.environ)[1])
        return _Start(*open_run_data(resolve(loaded.config)), warnings)
    except Exception as error:  # noqa: BLE001 - start_world raises it, after the others know
        return error


def _speaker(world: World) -> Say:
    def say(line: str) -> None:
        if world.rank == 0:
            show(line, sys.stderr)

    return say


def _run(config: Config, data: OpenData, world: World, folder: Path, say: Say, stop: StopRequest) -> int:
    metrics = folder / "metrics.jsonl"
    lineage = world.broadcast(next_lineage(metrics) if world.rank == 0 else None)
    if world.rank == 0:
        # what a reader finds if this process is killed or hangs; every ordered end writes over it
        write_exit(folder, "error", message="the run did not end by itself: it is running, was killed, or hung (see logs/)")
    sink: Sink = FanOut([])
    reason, facts, files = "error", {"message": ""}, ExitStack()
    try:
        mesh = open_mesh(config.parallel, config.model, world)
        start = open_start(config, data, world, folder, files)
        counted = parameters(config.model)
        if world.rank == 0:
            _write_manifest(folder, config, data, world, start)
            sink = _open_sinks(config, metrics, lineage, folder)
            tokens = config.batch.sequences * config.data.sequence_length
            show(
                format_header(
                    config.run.name, str(folder), counted.total, config.schedule.steps, tokens, world.size, world.device.name()
                ),
                sys.stdout,
            )
        reason, step = train_phases(config, data, mesh, folder, sink, lineage, stop, say, start)
        facts = {"message": _cause(reason, stop), "step": str(step)}
    except LeaseLost as error:
        reason, error.told = "lost", world.rank != 0
        raise
    except Exception as error:
        reason = "bad_input" if isinstance(error, InputError) and error.exit_code == 2 else "error"
        facts = {"message": f"rank {world.rank}: {type(error).__name__}: {error}"}
        (folder / "logs" / f"error-rank-{world.rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        files.close()
        sink.close()
        if (world.rank == 0 and reason != "lost") or reason in ("error", "bad_input"):
            write_exit(folder, reason, **facts)
    world.barrier()  # a launcher ends all ranks once one leaves with a code other than 0: rank 0's sinks have to be closed by then
    say(f"{reason} at step {facts['step']}; files in {folder}")
    return EXIT_CODES[reason]


def _write_manifest(folder: Path, config: Config, data: OpenData, world: World, start: Start | None) -> None:
    facts: dict[str, Any] = {"data_digest": data.digest, "parameters": parameters(config.model).total}
    record = start.record if start is not None else recorded(folder)
    if record is not None:
        facts["start"] = {name: record[name] for name in ("path", "step", "digest")}
    write_manifest(folder, **facts, world=world.size, device=world.device.name())


def _cause(reason: str, stop: StopRequest) -> str:
    return "" if reason == "done" else stop.cause or "another rank was asked to stop"


def _open_sinks(config: Config, metrics: Path, lineage: int, folder: Path) -> Sink:
    sinks: list[Sink] = [JsonlSink(metrics, lineage), ConsoleSink(config.schedule.steps, config.observe.console_every)]
    mirror = open_wandb(config.observe.wandb, folder, config.run.name, config.model_dump(mode="json"), lineage)
    return FanOut(sinks if mirror is None else [*sinks, mirror])
