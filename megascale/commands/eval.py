"""`megascale eval`: loss, perplexity and bits per byte of a run on held-out text or on files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands.trained_model import add_model_arguments, add_precision_argument, open_model
from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.data.batches import SequenceSet
    from megascale.train.load_run import LoadedModel
    from megascale.train.team import Team

LONGEST = 4096
"""Tokens of a window unless more are asked for; models made elsewhere may have contexts that no small machine can hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--sequences", default="all", metavar="N|all", help="sequences scored, from the first on (default: all)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--source", help="only the held-out text of this source")
    chosen.add_argument("--text", type=Path, nargs="+", action="extend", metavar="FILE", help="these files, each a document")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N",
        help="tokens the model sees at once (default: the run's; at most 4096 for models that were not trained here)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, metavar="S",
        help="windows that overlap, each S tokens further: all tokens behind the first window see at least"
        " sequence_length - S tokens before them (default: sequence_length, no overlap)",
    )  # fmt: skip
    add_precision_argument(parser)
    parser.add_argument(
        "--parallel", metavar="LAYOUT",
        help="of the ranks that a launcher starts: axes dp, pp, stream, cp, tp, ep, etp and context as in a config's section parallel, for"
        ' example "{tp: 2, pp: 2}" (default: all of them share the sequences)',
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: no run, checkpoint, source or file; streams of another trunk; a stride or a count that cannot be; a layout that does
            not fit.
    """
    from megascale.train.team import join_team

    with join_team(arguments.parallel, vars(arguments), lambda: _check(arguments)) as team:
        return _run(arguments, team)


def _check(arguments: argparse.Namespace) -> None:
    sequence_count(arguments.sequences)
    if arguments.sequence_length is not None and arguments.sequence_length < 1:
        raise InputError("--sequence-length", f"{arguments.sequence_length} is out of range", "give at least 1")


def _run(arguments: argparse.Namespace, team: Team) -> int:
    from megascale.train.evaluate import evaluate, text_sequences, validation_sequences

    count = sequence_count(arguments.sequences)
    loaded = open_model(arguments, team, arguments.sequence_length)
    length = _length(arguments.sequence_length, loaded)

    def sets() -> dict[str, SequenceSet]:
        if arguments.stride is not None and not 1 <= arguments.stride <= length:
            raise InputError("--stride", f"{arguments.stride} is out of range", f"give 1 to {length}, the sequence length")
        if arguments.text:
            return {str(path): text_sequences(loaded, path) for path in arguments.text}
        return dict(validation_sequences(loaded, arguments.source))

    found = {name: dataclasses.replace(sequences, length=length) for name, sequences in team.together(sets).items()}
    results = {name: evaluate(loaded, sequences, count, arguments.stride) for name, sequences in found.items()}
    if not team.leads:
        return 0
    if arguments.json:
        facts = {"run": str(arguments.run), "step": loaded.step, "sequence_length": length, "stride": arguments.stride or length}
        print(json.dumps({**facts, "results": results}, indent=1))
    else:
        print(_table(loaded.step, results))
    return 0


def _length(given: int | None, loaded: LoadedModel) -> int:
    """Tokens of a window."""
    from megascale.train.load_run import LoadedRun

    own = loaded.config.data.sequence_length
    return given or (own if isinstance(loaded, LoadedRun) else min(own, LONGEST))


def sequence_count(text: str) -> int | None:
    """The number in `--sequences N|all`; None for all. Raises InputError for anything else."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError("--sequences", f"{text!r} is no number of sequences", "give a number from 1 on, or all")
    return int(text)


def _table(step: int, results: dict[str, dict[str, Any]]) -> str:
    width = max(len("held-out text"), *map(len, results))
    columns = ("step", 8), ("loss", 8), ("perplexity", 12), ("bits/byte", 9), ("tokens", 14), ("bytes", 14)
    lines = ["  ".join(["held-out text".ljust(width), *(name.rjust(wide) for name, wide in columns)])]
    for name, found in results.items():
        bits = "-" if found["bits_per_byte"] is None else f"{found['bits_per_byte']:.4f}"
        size = "-" if found["bytes"] is None else f"{found['bytes']:,}"
        cells = (str(step), f"{found['loss']:.4f}", f"{found['perplexity']:,.2f}", bits, f"{found['tokens']:,}", size)
        padded = (cell.rjust(wide) for cell, (_, wide) in zip(cells, columns, strict=True))
        lines.append("  ".join([name.ljust(width), *padded]))
    return "\n".join(lines)
