"""`megascale checkpoint`: list the checkpoints of a run, and verify them."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from megascale.config.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True)
    meanings = {
        "ls": "list checkpoints: step, size, time, tokens, and whether each is good",
        "verify": "check size and digest of every file; exit code 2 if anything is damaged",
    }
    for verb, meaning in meanings.items():
        one = verbs.add_parser(verb, help=meaning, description=meaning)
        one.add_argument("path", type=Path, help="a run folder, its checkpoints folder, or one checkpoint")
        one.add_argument("--json", action="store_true", help="print one JSON document")
        if verb == "ls":
            one.add_argument("--quick", action="store_true", help="check presence and size of files, not their digests")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: there is no checkpoint at the path; `verify` found a damaged one.
    """
    quick = arguments.checkpoint_verb == "ls" and arguments.quick
    rows = [_row(path, quick) for path in _find(arguments.path)]
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'step':>10}  {'size':>18}  {'saved at (UTC)':<25}  {'tokens':>18}  status")
        for row in rows:
            print(_line(row))
    damaged = [row for row in rows if row["status"] == "damaged"]
    if arguments.checkpoint_verb == "verify" and damaged:
        reasons = "; ".join(row["reason"] for row in damaged)
        remedy = "training resumes from the newest good checkpoint; delete the damaged ones or restore them from a copy"
        raise InputError(str(arguments.path), f"{len(damaged)} of {len(rows)} checkpoints are damaged: {reasons}", remedy)
    return 0


def _find(path: Path) -> list[Path]:
    """The checkpoint folders that the user means, newest first."""
    from megascale.checkpoint.folders import READABLE, list_checkpoints
    from megascale.checkpoint.index import INDEX

    if (READABLE.fullmatch(path.resolve().name) and path.is_dir()) or (path / INDEX).exists():
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise InputError(
            str(path), "holds no checkpoint", "give a run folder (runs/NAME), its checkpoints folder, or one checkpoint"
        )
    return found


def _row(path: Path, quick: bool) -> dict[str, Any]:
    """What is known of one checkpoint."""
    from megascale.checkpoint.errors import CheckpointError
    from megascale.checkpoint.load import CheckpointReader

    row: dict[str, Any] = {"path": str(path), "step": None, "bytes": None, "saved_at": None, "tokens": None}
    start = time.monotonic()
    try:
        reader = CheckpointReader(path)
        row.update(step=reader.step, bytes=reader.manifest.size, saved_at=reader.manifest.saved_at)
        if quick:
            reader.check_sizes()
        else:
            reader.verify()
            row["bytes_per_second"] = round(reader.manifest.size / max(time.monotonic() - start, 1e-9))
        row.update(tokens=reader.state.get("tokens"), status="complete" if quick else "ok")
    except CheckpointError as error:
        row.update(status="damaged", reason=f"{error.place} {error.reason}")
    return row


def _line(row: dict[str, Any]) -> str:
    step = row["step"] if row["step"] is not None else Path(row["path"]).name
    size = f"{row['bytes']:,} B" if row["bytes"] is not None else "-"
    tokens = f"{row['tokens']:,}" if isinstance(row["tokens"], int) else "-"
    speed = f" ({row['bytes_per_second'] / 1e9:.1f} GB/s)" if "bytes_per_second" in row else ""
    reason = f": {row['reason']}" if "reason" in row else ""
    return f"{step:>10}  {size:>18}  {row['saved_at'] or '-':<25}  {tokens:>18}  {row['status']}{speed}{reason}"
