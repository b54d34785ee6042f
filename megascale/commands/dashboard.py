"""`megascale dashboard`: shows the W&B dashboard as code, checks it against a run, saves it to a project."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megascale.config.errors import InputError
from megascale.observe.dashboard import SECTIONS, build_workspace, panel_metrics, workspace_json
from megascale.observe.sinks import read_metrics
from megascale.observe.wandb_sink import logged_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `show` and `push` with their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|push")
    show = actions.add_parser("show", help="print the sections and panels, and what a run has logged for them")
    show.add_argument("--run", type=Path, metavar="RUN_FOLDER", help="also list the metrics of this run in each panel")
    show.add_argument("--workspace", action="store_true", help="print the W&B workspace itself, as JSON")
    show.add_argument("--entity", default="", help="with --workspace: team or user written into it")
    show.add_argument("--project", default="megascale", help="with --workspace: project written into it")
    show.add_argument("--json", action="store_true", help="print JSON")
    push = actions.add_parser("push", help="save the dashboard as a workspace of a W&B project; needs a login")
    push.add_argument("--entity", required=True, help="team or user")
    push.add_argument("--project", required=True, help="project of the runs")


def run(arguments: argparse.Namespace) -> int:
    """Runs the verb; returns 0. Raises InputError for a missing login, package or run."""
    if arguments.action == "push":
        print(f"saved: {_push(arguments.entity, arguments.project)}")
    elif arguments.workspace:
        print(workspace_json(build_workspace(arguments.entity, arguments.project)))
    else:
        panels = _describe(arguments.run)
        print(json.dumps(panels, indent=2) if arguments.json else _as_text(panels))
    return 0


def _describe(run_folder: Path | None) -> list[dict[str, Any]]:
    """One entry per panel; with a run folder each also lists the logged metrics by pattern."""
    logged = None if run_folder is None else {n for record in read_metrics(run_folder / "metrics.jsonl") for n in record}
    described = []
    for section in SECTIONS:
        for panel in section.panels:
            entry: dict[str, Any] = {
                "section": section.title,
                "panel": panel.title,
                "x": panel.x,
                "metrics": list(panel.metrics),
                "needs": panel.needs,
            }
            if logged is not None:
                entry["logged"] = panel_metrics(panel, logged)
            described.append(entry)
    return described


def _as_text(panels: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    section = None
    for panel in panels:
        if panel["section"] != section:
            section = panel["section"]
            lines.append(section)
        needs = f"  (runs with: {panel['needs']})" if panel["needs"] else ""
        lines.append(f"  {panel['panel']}, over {panel['x']}{needs}")
        for pattern in panel["metrics"]:
            names = panel.get("logged", {}).get(pattern)
            found = "" if names is None else f"  logged: {', '.join(names)}" if names else "  not logged"
            lines.append(f"    {pattern}{found}")
    return "\n".join(lines)


def _push(entity: str, project: str) -> str:
    """Saves the workspace and returns its address."""
    workspace = build_workspace(entity, project)
    if not logged_in():
        remedy = "run `wandb login`, or set WANDB_API_KEY"
        raise InputError("megascale dashboard push", "there is no login for Weights & Biases", remedy)
    import requests
    import wandb

    try:
        workspace.save()
    except (wandb.Error, requests.RequestException) as error:
        remedy = "check the network, WANDB_BASE_URL, and that the project exists and the login may write to it"
        raise InputError("megascale dashboard push", f"the server did not take the workspace: {error}", remedy) from error
    return workspace.url
