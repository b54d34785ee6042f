"""megascale train: train a config, or resume it (the same as launch/pretrain.py)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megascale.config.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers; LOCAL_RANK in the environment counts")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print layout, memory, FLOPs and traffic of one step, without a cluster",
    )
    parser.add_argument("--world", type=int, metavar="N", help="with --dry-run: number of ranks (default: the launcher's, or 1)")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: bad input; --world or --json without --dry-run.
    """
    if arguments.dry_run:
        return _dry_run(arguments)
    for name, given in (("--world", arguments.world is not None), ("--json", arguments.json)):
        if given:
            raise InputError(
                name, "belongs to --dry-run; a launcher decides the ranks of a real run", f"add --dry-run, or leave out {name}"
            )
    from megascale.train.main import train

    return train(arguments.config, arguments.overrides)


def _dry_run(arguments: argparse.Namespace) -> int:
    from megascale.parallel.world import rank_variables

    rank, launched, *_ = rank_variables(os.environ)
    if rank > 0:  # started by a launcher: one process is enough, and one answer
        return 0
    world = launched if arguments.world is None else arguments.world
    if world < 1:
        raise InputError("--world", f"{world} is too small", "give at least 1")

    from rich.console import Console

    from megascale.train.dry_run import dry_run
    from megascale.train.dry_run_text import as_json, print_dry_run

    found = dry_run(arguments.config, arguments.overrides, world)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        console = Console()
        print_dry_run(found, console if console.is_terminal else Console(width=200))
    return 0
