"""`megascale streams`: what a run has learned beside a frozen trunk, as a folder of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="streams_verb", required=True, metavar="VERB")
    meaning = "write a run's prefixes and aggregator, without the trunk, into a new folder"
    save = verbs.add_parser("save", help=meaning, description=meaning)
    save.add_argument("run", type=Path, metavar="RUN_FOLDER", help="runs/NAME, of a model with several streams")
    save.add_argument("target", type=Path, metavar="FOLDER", help="a new folder")
    save.add_argument("--step", type=int, help="of the checkpoint; default: the newest good one")
    save.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: no such run or checkpoint, a run without streams, a target that exists.
    """
    from megascale.checkpoint.stream_set import write_set
    from megascale.train.start import recorded
    from megascale.train.stream_sets import set_of_run

    found = set_of_run(arguments.run, arguments.step)
    record = write_set(found, arguments.target)
    origin = recorded(arguments.run)
    facts = {
        "folder": str(arguments.target),
        "streams": found.streams.count,
        "tensors": len(found.tensors),
        "bytes": record.size,
        "trunk": found.trunk,
        "trunk_path": origin["path"] if origin is not None and origin["digest"] == found.trunk else None,
        **found.origin,
    }
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(
        f"{facts['folder']}: P = {facts['streams']}, {facts['tensors']} tensors, {facts['bytes']:,} bytes, step {facts['step']}"
    )
    if facts["trunk_path"] is not None:
        print(f"use it: megascale generate {facts['trunk_path']} --streams {facts['folder']} --prompt 'Once'")
    else:
        print(f"the trunk was trained too: the set fits the weights of {facts['run']}, step {facts['step']}, only")
    return 0
