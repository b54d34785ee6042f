"""`megascale report`: what a run reached, beside gzip and xz on the same held-out text, with a sample and what to type next."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="runs/NAME")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest good one")
    parser.add_argument("--sequences", default="all", metavar="N|all", help="held-out sequences scored, by source (default: all)")
    parser.add_argument("--html", action="store_true", help="also write RUN_FOLDER/report.html, one page with the loss curve")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: no run, no checkpoint, no metrics, a number of sequences that is none.
    """
    from megascale.commands.eval import sequence_count

    count = sequence_count(arguments.sequences)

    from megascale.train.load_run import load_run
    from megascale.train.report_text import print_report
    from megascale.train.run_report import collect

    facts = collect(load_run(arguments.run, arguments.step), count, _say)
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        print_report(facts)
    if arguments.html:
        from megascale.train.report_html import report_html

        page = arguments.run / "report.html"
        page.write_text(report_html(facts), encoding="utf-8")
        _say(f"wrote {page}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
