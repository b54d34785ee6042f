"""The SLURM job script of a run: launch/slurm/pretrain.sbatch with its header and settings written for one config."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megascale
from megascale.config.errors import InputError

ROOT = Path(megascale.__file__).resolve().parent.parent
TEMPLATE = ROOT / "launch" / "slurm" / "pretrain.sbatch"
PRETRAIN = ROOT / "launch" / "pretrain.py"
COMMON = "# What follows is the same for every run "
"""begins the line of the template from which on nothing is replaced"""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class Job:
    """What to ask of SLURM."""

    nodes: int
    gpus: int
    """on each node; 0: none, and `ranks` ranks on its CPUs"""
    ranks: int
    """on each node"""
    time: str
    """limit of one start, as sbatch writes it: 30 (minutes), 24:00:00, 2-12"""
    warning_seconds: int
    """between USR1, upon which the run saves, and the limit"""
    array: int = 0
    """starts in a row as elements of an array; 0: one job that requeues itself"""
    max_restarts: int = 100
    partition: str | None = None
    container: str | None = None
    """image for pyxis"""
    mounts: str | None = None
    """SOURCE:TARGET[,...] for the container"""
    options: tuple[str, ...] = ()
    """more options of sbatch"""


def job_script(job: Job, config_file: Path, overrides: Sequence[str], run_name: str, run_folder: Path) -> str:
    """The script. Relative paths hold in the folder where it is written: the job runs there.

    Raises:
        InputError: a value that sbatch would misread, a warning that would come before the start, or an installation without launch/.
    """
    if not (TEMPLATE.exists() and PRETRAIN.exists()):
        reason = f"{TEMPLATE} is not there: the package was installed without the repository's launch/"
        raise InputError("megascale slurm", reason, "run it from a clone of the repository (pip install -e .)")
    _, mark, common = TEMPLATE.read_text().partition(COMMON)
    assert mark, f"{TEMPLATE} has lost its mark"
    lines = [*_header(job, run_name), "", *_settings(job, config_file, overrides, run_folder), "", mark + common]
    return "\n".join(lines)


def _header(job: Job, run_name: str) -> list[str]:
    limit = seconds_of(job.time)
    if job.warning_seconds >= limit:
        reason = f"{job.warning_seconds} s before the end of {limit} s is before the start"
        raise InputError("--warning-seconds", reason, "choose a longer --time or a shorter --warning-seconds")
    options = [
        f"--job-name={run_name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        f"--time={job.time}",
        f"--signal=B:USR1@{job.warning_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={Path.cwd()}",
        f"--output={'%x-%A_%a.out' if job.array else '%x-%j.out'}",
    ]
    if job.gpus:
        options.append(f"--gres=gpu:{job.gpus}")
    if job.array:
        options.append(f"--array=1-{job.array}%1")
    if job.partition is not None:
        options.append(f"--partition={job.partition}")
    return ["#!/bin/bash", *(_sbatch_line(option) for option in [*options, *job.options])]


def _sbatch_line(option: str) -> str:
    """An option as sbatch reads it: a blank would end it, and `#` begins a comment."""
    if not option.startswith("-") or re.search(r"[\x00-\x1f\"'\\]", option):
        raise InputError(
            f"option {option!r} of sbatch",
            "begins without -, or holds a quote, a backslash or a line break",
            "write it as --name=value, or add it to the written script",
        )
    name, equals, value = option.partition("=")
    return f'#SBATCH {name}{equals}"{value}"' if re.search(r"[\s#]", value) else f"#SBATCH {option}"


def _settings(job: Job, config_file: Path, overrides: Sequence[str], run_folder: Path) -> list[str]:
    ranks = f"{job.nodes} x {job.ranks} ranks"
    training = shlex.join(["--config", str(config_file), *overrides])
    lines = [
        f"# Written by `megascale slurm` for {ranks}, checked for that many. Submit it with sbatch (docs/slurm.md).",
        "",
        f"training=({training})",
        f"ranks={job.ranks}",
        f"max_restarts={job.max_restarts}",
        f"image={shlex.quote(job.container or '')}",
        f"mounts={shlex.quote(job.mounts or _own_mounts())}",
        f"pretrain={shlex.quote(str(PRETRAIN))}",
        f"run={shlex.quote(str(run_folder))}",
    ]
    if job.container is None:
        lines.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    return lines


def _own_mounts() -> str:
    """The repository and the folder where the job runs, as pyxis mounts them."""
    here = Path.cwd()
    return ",".join(f"{folder}:{folder}" for folder in ([ROOT] if here.is_relative_to(ROOT) else [ROOT, here]))


def seconds_of(time: str) -> int:
    """A time limit as sbatch reads it, in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises:
        InputError: it is none of these.
    """
    found = TIME.fullmatch(time)
    if found is None:
        raise InputError(
            "--time", f"{time} is no time limit of SLURM", "write minutes, hours:minutes:seconds or days-hours, as 24:00:00"
        )
    days = found["days"]
    numbers = [int(found[name]) for name in ("first", "second", "third") if found[name] is not None]
    if days is not None:
        units = (3600, 60, 1)
    else:
        units = (60, 1, 0) if len(numbers) < 3 else (3600, 60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
