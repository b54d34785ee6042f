"""`megascale eval`: loss, perplexity and bits per byte of a run on held-out text or on files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megascale.config.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="runs/NAME")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest good one")
    parser.add_argument("--sequences", default="all", metavar="N|all", help="sequences scored, from the first on (default: all)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--source", help="only the held-out text of this source")
    chosen.add_argument("--text", type=Path, nargs="+", action="extend", metavar="FILE", help="these files, each a document")
    parser.add_argument(
        "--stride", type=int, metavar="S",
        help="windows that overlap, each S tokens further: all tokens behind the first window see at least"
        " sequence_length - S tokens before them (default: sequence_length, no overlap)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: no run, checkpoint, source or file; a stride or a count that cannot be.
    """
    count = sequence_count(arguments.sequences)

    from megascale.train.evaluate import evaluate, text_sequences, validation_sequences
    from megascale.train.load_run import load_run

    loaded = load_run(arguments.run, arguments.step, arguments.precision)
    length = loaded.config.data.sequence_length
    if arguments.stride is not None and not 1 <= arguments.stride <= length:
        raise InputError("--stride", f"{arguments.stride} is out of range", f"give 1 to {length}, the run's sequence length")
    if arguments.text:
        sets = {str(path): text_sequences(loaded, path) for path in arguments.text}
    else:
        sets = validation_sequences(loaded, arguments.source)
    results = {name: evaluate(loaded, sequences, count, arguments.stride) for name, sequences in sets.items()}
    if arguments.json:
        facts = {"run": str(arguments.run), "step": loaded.step, "sequence_length": length, "stride": arguments.stride or length}
        print(json.dumps({**facts, "results": results}, indent=1))
    else:
        print(_table(loaded.step, results))
    return 0


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
