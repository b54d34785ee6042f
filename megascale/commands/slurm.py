"""`megascale slurm`: write the SLURM job script of a run, after checking its config for that many ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.train.dry_run import DryRun
    from megascale.train.job_script import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="G", help="GPUs of a node, one rank on each; default: none"
    )
    ranks.add_argument("--ranks-per-node", type=int, default=1, metavar="R", help="without GPUs: ranks on a node; default: 1")
    parser.add_argument(
        "--time", default="24:00:00", metavar="T", help="limit of one start, as sbatch takes it; default: 24:00:00"
    )
    parser.add_argument(
        "--warning-seconds", type=int, default=600, metavar="S", help="save and requeue so long before the limit; default: 600"
    )
    parser.add_argument("--partition", metavar="NAME", help="partition of the cluster; default: the cluster's")
    parser.add_argument("--array", type=int, default=0, metavar="N", help="N starts in a row as an array, none requeued")
    parser.add_argument("--max-restarts", type=int, default=100, metavar="N", help="requeue so often at most; default: 100")
    parser.add_argument("--container", metavar="IMAGE", help="run in this image (pyxis)")
    parser.add_argument("--container-mounts", metavar="A:B[,...]", help="what the container sees; default: the repository")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more option, as --sbatch=--account=mine; repeatable"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the script there; default: print it")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: the config does not fit that many ranks, or the job makes no sense.
    """
    from megascale.train.dry_run import dry_run
    from megascale.train.job_script import job_script

    job = _job(arguments)
    found = dry_run(arguments.config, arguments.overrides, job.nodes * job.ranks)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    place = found.config.run
    text = job_script(job, arguments.config, arguments.overrides, place.name, Path(place.folder) / place.name)
    print(_summary(job, found), file=sys.stderr)
    if arguments.output is None:
        print(text, end="")
        return 0
    try:
        arguments.output.write_text(text)
    except OSError as error:
        raise InputError("--output", f"{arguments.output} cannot be written: {error.strerror}", "choose another file") from error
    print(f"submit it: sbatch {arguments.output}", file=sys.stderr)
    return 0


def _job(arguments: argparse.Namespace) -> Job:
    from megascale.train.job_script import Job

    least = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1, "array": 0, "max_restarts": 0, "warning_seconds": 1}
    for name, smallest in least.items():
        if (given := getattr(arguments, name)) < smallest:
            raise InputError(f"--{name.replace('_', '-')}", f"{given} is too small", f"give at least {smallest}")
    if arguments.container_mounts is not None and arguments.container is None:
        raise InputError("--container-mounts", "has no effect without --container", "add --container IMAGE, or leave it out")
    return Job(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        ranks=arguments.gpus_per_node or arguments.ranks_per_node,
        time=arguments.time,
        warning_seconds=arguments.warning_seconds,
        array=arguments.array,
        max_restarts=arguments.max_restarts,
        partition=arguments.partition,
        container=arguments.container,
        mounts=arguments.container_mounts,
        options=tuple(arguments.sbatch),
    )


def _summary(job: Job, found: DryRun) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in found.layout.sizes.items() if size > 1) or "one rank"
    memory = max(rank.memory.total for rank in found.ranks) / 2**20
    return f"{job.nodes} x {job.ranks} ranks: {axes}; at most {memory:,.0f} MiB a rank (megascale train --dry-run explains it)"
