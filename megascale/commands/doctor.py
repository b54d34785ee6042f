"""`megascale doctor`: what this machine offers, and a self test: train on two ranks, stop, resume, compare."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megascale.train.machine import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--no-self-test", dest="self_test", action="store_false", help="only look, do not train")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns 0 when nothing failed, else 1."""
    from megascale.train.machine import FAILED

    findings: list[Finding] = []
    for finding in _findings(arguments.self_test):
        findings.append(finding)
        if not arguments.json:
            print(f"{finding.verdict:<6}  {finding.name:<16}  {finding.text}", flush=True)
    failed = [finding.name for finding in findings if finding.verdict == FAILED]
    if arguments.json:
        print(json.dumps({"good": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"failed: {', '.join(failed)}" if failed else "all good")
    return 1 if failed else 0


def _findings(self_test: bool) -> Iterator[Finding]:
    """One after the other; the self test only on a machine on which it can work."""
    from megascale.train.machine import FAILED, inspect_machine

    machine = inspect_machine()
    yield from machine
    if self_test and all(finding.verdict != FAILED for finding in machine):
        from megascale.train.self_test import run_self_test

        yield from run_self_test()
