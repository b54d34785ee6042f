"""megascale train: train a config, or resume it (the same as launch/pretrain.py)."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers; LOCAL_RANK in the environment counts")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    from megascale.train.main import train

    return train(arguments.config, arguments.overrides)
