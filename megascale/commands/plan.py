"""`megascale plan`: the fastest layouts of a run on a cluster, with memory, days and price; the planner's errors on published runs.

`plan axes` and `plan scaling` have modules of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.commands import plan_axes, plan_scaling
from megascale.commands.numbers import IMBALANCE, TOP
from megascale.commands.written import check_writable, save
from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.config.load import LoadedConfig
    from megascale.config.schema import Config, Schedule
    from megascale.plan.cluster import Cluster
    from megascale.plan.layouts import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--check", action="store_true", help="the planner's errors on published runs, instead of a plan")
    parser.add_argument("--config", type=Path, help="YAML file of the run; its own layout is not read")
    parser.add_argument("--cluster", metavar="NAME", help="a name in configs/clusters (a100, h100, h200, b200), or a YAML file")
    parser.add_argument("--gpus", metavar="N", help="number of GPUs; with scaling several: 8,64,512")
    parser.add_argument("--tokens", type=float, metavar="D", help="training tokens, for days and price; default: the run's steps")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=IMBALANCE,
        metavar="X",
        help="rows of the fullest expert rank over an even share; default: 1",
    )
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help="layouts to show; default: 10")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the run with the fastest layout there; axes: that of a design"
    )
    parser.add_argument("--slurm", type=Path, metavar="FILE", help="with --write: write the run's SLURM job script there")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="scaling: a picture, .png, .pdf or .svg; axes: a folder for pictures"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that win over the file; `axes`, or `scaling` and settings"
    )
    plan_scaling.add_arguments(parser)
    plan_axes.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: missing or senseless arguments, an unknown cluster, a run that no layout of the GPUs holds.
    """
    if arguments.overrides[:1] == ["axes"]:
        return plan_axes.run(arguments)
    plan_axes.refuse_axis_options(arguments)
    if arguments.overrides[:1] == ["scaling"]:
        return plan_scaling.run(arguments)
    for name in ("plot", "weak"):
        if getattr(arguments, name):
            raise InputError(f"--{name}", "is read by the scaling and the axes only", "megascale plan scaling --config FILE ...")
    if arguments.check:
        return _check(arguments)
    for name in ("config", "cluster", "gpus"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name}", "is missing", "a plan needs --config, --cluster and --gpus; or give --check alone")
    gpus = _gpus(arguments.gpus)
    _refuse_senseless(arguments)
    from rich.console import Console

    from megascale.config.checks import check
    from megascale.config.load import load_config
    from megascale.config.resolve import resolve
    from megascale.plan import report
    from megascale.plan.cluster import load_cluster
    from megascale.plan.layouts import search
    from megascale.plan.parts import run_tokens

    cluster = load_cluster(arguments.cluster)
    loaded = load_config(arguments.config, arguments.overrides)
    check(loaded)
    _refuse_unwritable(arguments, loaded, cluster, gpus)
    config = resolve(loaded.config)
    started = time.perf_counter()
    result = search(config, cluster, gpus, arguments.top, arguments.imbalance, arguments.tokens)
    seconds = time.perf_counter() - started
    facts = report.plan_facts(result, cluster, arguments.tokens or run_tokens(config), seconds)
    chosen = None if arguments.write is None else _chosen(loaded, result.found[0], arguments.tokens)
    if arguments.json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        report.print_plan(facts, Console())
    if chosen is not None:
        _write(arguments, chosen, cluster, gpus)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megascale.plan import published, report

    unread = {**dict.fromkeys(("config", "cluster", "gpus", "tokens", "write", "slurm")), "top": TOP, "imbalance": IMBALANCE}
    given = [name for name, default in unread.items() if getattr(arguments, name) != default]
    if given or arguments.overrides:
        raise InputError(
            "--check", f"has no use for {', '.join(f'--{name}' for name in given) or 'overrides'}", "give --check alone"
        )
    facts = report.check_facts(published.checks())
    if arguments.json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        report.print_checks(facts, Console())
    return 1 if any(summary["unexplained"] for summary in facts["summary"]) else 0


def _gpus(text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise InputError("--gpus", f"{text!r} is no whole number", "give for example 64; several with `plan scaling`") from error
    if number < 1:
        raise InputError("--gpus", f"{number} is too small", "give at least 1")
    return number


def _refuse_senseless(arguments: argparse.Namespace) -> None:
    for name, least in (("top", 1), ("imbalance", 1.0)):
        if not getattr(arguments, name) >= least:
            raise InputError(f"--{name}", f"{getattr(arguments, name)} is too small", f"give at least {least}")
    if arguments.tokens is not None and not 0 < arguments.tokens < math.inf:
        raise InputError("--tokens", f"{arguments.tokens} is no number of tokens", "give for example 1e12")
    if not math.isfinite(arguments.imbalance):
        raise InputError("--imbalance", f"{arguments.imbalance} is not finite", "give for example 1.3")
    if arguments.slurm is not None and arguments.write is None:
        raise InputError("--slurm", "the job script starts a config file", "add --write FILE")


def _refuse_unwritable(arguments: argparse.Namespace, loaded: LoadedConfig, cluster: Cluster, gpus: int) -> None:
    """What --write and --slurm could not write, before the search."""
    for option, path in (("--write", arguments.write), ("--slurm", arguments.slurm)):
        if path is not None:
            check_writable(path, option)
    if arguments.write is not None and arguments.tokens is not None and loaded.config.schedule.phases:
        raise InputError("--tokens", "the run's phases fix its steps, and --write would change them", "leave --tokens out")
    each = min(cluster.devices_per_node, gpus)
    if arguments.slurm is not None and gpus % each:
        reason = f"{gpus} GPUs do not fill nodes of {each}"
        raise InputError("--slurm", reason, "plan for whole nodes, or use `megascale slurm`")


def _chosen(loaded: LoadedConfig, found: Found, tokens: float | None) -> Config:
    """The run with the layout and as many steps as the tokens ask for; InputError where it could not start."""
    from megascale.config.checks import check
    from megascale.plan.parts import steps_for

    config, schedule = loaded.config, loaded.config.schedule
    if tokens is not None:
        schedule = _of_steps(schedule, math.ceil(steps_for(config, tokens)))
    batch = config.batch.model_copy(update={"micro_batches": found.plan.micro_batches})
    parallel = found.config.parallel.model_copy(update={"dp": found.plan.dp})
    chosen = config.model_copy(update={"batch": batch, "schedule": schedule, "parallel": parallel})
    kept = {path: origin for path, origin in loaded.origin.items() if path[0] != "parallel"}  # the file's own layout is replaced
    check(replace(loaded, config=chosen, origin=kept), found.plan.world)
    return chosen


def _of_steps(schedule: Schedule, steps: int) -> Schedule:
    """A schedule of so many steps; warm-up and decay are shortened to fit, and stderr says so."""
    warmup, decay = min(schedule.warmup_steps, steps - 1), schedule.decay_steps
    if schedule.shape == "wsd":
        falls = decay or max(1, steps // 5)
        if schedule.warmup_steps + falls > steps:
            warmup = steps * schedule.warmup_steps // (schedule.warmup_steps + falls)
            decay = steps - warmup
    update = {"steps": steps, "warmup_steps": warmup, "decay_steps": decay}
    for name in ("warmup_steps", "decay_steps"):
        if update[name] != (before := getattr(schedule, name)):
            print(f"--tokens: {steps:,} steps: schedule.{name} {before or 'a fifth'} becomes {update[name]}", file=sys.stderr)
    return schedule.model_copy(update=update)


def _write(arguments: argparse.Namespace, chosen: Config, cluster: Cluster, gpus: int) -> None:
    """The chosen run's config and its job script."""
    from megascale.config.write import dump

    save(arguments.write, dump(chosen), "--write")
    if arguments.slurm is not None:
        from megascale.train.job_script import Job, job_script

        each = min(cluster.devices_per_node, gpus)
        job = Job(nodes=gpus // each, gpus=each, ranks=each, time="24:00:00", warning_seconds=600)
        place = chosen.run
        save(arguments.slurm, job_script(job, arguments.write, (), place.name, Path(place.folder) / place.name), "--slurm")
