"""`megascale plan scaling`: strong and weak scaling of a run, the best layout at each number of GPUs, as a table and a picture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from megascale.commands.numbers import TOP, whole_numbers
from megascale.config.errors import InputError

_NOT_READ = {"write": None, "slurm": None, "top": TOP, "check": False}
"""what the verb takes for one number of GPUs, and its defaults"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the scaling takes beside --config, --cluster, --gpus, --tokens, --imbalance, --plot and --json."""
    group = parser.add_argument_group("plan scaling", "a run on ever more GPUs; --gpus 8,64,512 names the numbers")
    group.add_argument(
        "--weak", action="store_true", help="the batch grows with the GPUs; the run's is that of the smallest number"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit code.

    Raises:
        InputError: see `facts_of`; the picture cannot be written.
    """
    facts = facts_of(arguments)
    if arguments.json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        from megascale.plan.scaling_text import scaling_lines

        for line in scaling_lines(facts):
            print(line)
    if arguments.plot is not None:
        from megascale.plan.scaling_plots import plot_scaling

        plot_scaling(facts, arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)
    return 0


def facts_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scaling in plain values.

    Raises:
        InputError: missing, senseless or unread arguments, an unknown cluster, a run that none of the numbers of GPUs trains.
    """
    from megascale.config.checks import check
    from megascale.config.load import load_config
    from megascale.config.resolve import resolve
    from megascale.plan.cluster import load_cluster
    from megascale.plan.parts import run_tokens
    from megascale.plan.scaling import scale, scaling_facts, usual_counts

    _refuse_senseless(arguments)
    gpus = None if arguments.gpus is None else whole_numbers("--gpus", arguments.gpus)
    cluster = load_cluster(arguments.cluster)
    loaded = load_config(arguments.config, arguments.overrides[1:])
    check(loaded)
    config = resolve(loaded.config)
    tokens = arguments.tokens or run_tokens(config)
    counts = gpus or usual_counts(config, cluster, arguments.weak)
    found = scale(config, cluster, counts, arguments.weak, arguments.imbalance, tokens)
    return scaling_facts(found, cluster, tokens)


def _refuse_senseless(arguments: argparse.Namespace) -> None:
    for name in ("config", "cluster"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name}", "is missing", "scaling needs --config and --cluster")
    for name, default in _NOT_READ.items():
        if getattr(arguments, name) != default:
            raise InputError(f"--{name}", "is not read by the scaling", "plan one number of GPUs without `scaling`")
    if arguments.tokens is not None and not 0 < arguments.tokens < math.inf:
        raise InputError("--tokens", f"{arguments.tokens} is no number of tokens", "give for example 1e12")
    if not 1 <= arguments.imbalance < math.inf:
        raise InputError("--imbalance", f"{arguments.imbalance} is no factor of 1 or more", "give for example 1.3")
