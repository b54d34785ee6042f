"""The trained model that a verb opens: its arguments, and the model they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megascale.train.load_run import LoadedModel
    from megascale.train.team import Team


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the model comes from."""
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="runs/NAME, or a Hugging Face folder")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest good one")
    parser.add_argument(
        "--streams", type=Path, metavar="FOLDER",
        help="prefixes and aggregator for this model as the trunk: what `megascale streams save` wrote, or the run that trained them",
    )  # fmt: skip


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Declare what the weights are in memory."""
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")


def open_model(arguments: argparse.Namespace, team: Team, length: int | None) -> LoadedModel:
    """The model that the arguments name, shared by the team.

    Args:
        length: tokens of the sequences that the layout has to fit; none = those of the training.

    Raises:
        InputError: no such run or checkpoint, streams of another trunk, a layout that does not fit.
    """
    from megascale.train.load_run import load_model
    from megascale.train.stream_sets import open_set

    loaded = load_model(arguments.run, arguments.step, arguments.precision, team, length)
    if arguments.streams is None:
        return loaded
    return team.together(lambda: loaded.with_streams(open_set(arguments.streams)))
