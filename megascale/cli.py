"""The command line: `megascale VERB ...`. Each verb lives in megascale/commands/."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megascale.config.errors import InputError

VERBS = {
    "train": "train a config, or resume it",
    "prepare": "make a corpus from text, code, jsonl, parquet or a Hugging Face dataset",
    "data": "prepare, inspect or verify corpora",
    "config": "show, validate, compare configs; their JSON schema",
    "eval": "loss and bits per byte of a run on held-out text",
    "generate": "continue a text with a trained run",
    "report": "what a run reached, beside compressors, with a sample",
    "checkpoint": "list or verify checkpoints",
    "streams": "save what a run has learned beside a frozen trunk",
    "convert": "Hugging Face folders to runs, and runs to Hugging Face folders",
    "laws": "published scaling laws, predictions, fits of runs, comparisons, plots",
    "plan": "memory, time, price and the fastest layouts of a run on a cluster",
    "slurm": "the SLURM job script of a run, its config checked for that many ranks",
    "dashboard": "the W&B workspace as code: show or push",
    "doctor": "versions, devices, and a two-rank train and resume self test",
}


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("megascale", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, help_text in VERBS.items():
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        if name == verb:  # only this verb's module is imported, so that each starts fast
            importlib.import_module(f"megascale.commands.{name}").add_arguments(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Bad input is one message on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in given if word in VERBS), None)
    parsed = _parser(verb).parse_args(given)
    try:
        return importlib.import_module(f"megascale.commands.{parsed.verb}").run(parsed)
    except InputError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def leave(code: int) -> NoReturn:
    """End this process; if it had a process group, without tearing the interpreter down.

    gloo's threads live as long as anything refers to their group (DeepSpeed does for ever), and take the interpreter's lock when they let
    go of a tensor. A thread that does so while the interpreter ends is cancelled amid C++ that cannot be unwound, and aborts the
    process ("terminate called without an active exception"): rarely, and behind a run that was done.
    """
    launched = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    if not launched or "torch.distributed" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
