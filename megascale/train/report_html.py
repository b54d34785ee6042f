"""The run report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from megascale.train.report_text import MODEL, held_out_rows, held_out_title, training_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #ddd; }
td + td { text-align: right; font-variant-numeric: tabular-nums; } tr.model { font-weight: bold; color: #06683a; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; white-space: pre-wrap; } img { max-width: 100%; }
"""


def report_html(facts: dict[str, Any]) -> str:
    """The page of the facts of `megascale.train.run_report.collect`."""
    parts = [
        f"<h1>run {escape(facts['run'])}, step {facts['step']}</h1><p>files in {escape(facts['folder'])}</p>",
        _section("loss", f'<img alt="loss by step" src="data:image/png;base64,{_loss_curve(facts["curves"])}">'),
        _section("training", _table(training_rows(facts["training"], facts["ended"]))),
    ]
    for source, found in facts["held_out"].items():
        rows = [(name, f"{bits:.3f} bits per byte") for name, bits in held_out_rows(found)]
        parts.append(_section(held_out_title(source, found), _table(rows)))
    counts = [(name.replace("_", " "), f"{count:,}") for name, count in facts["parameters"].items()]
    parts.append(_section("parameters", _table(counts)))
    if facts["sample"] is not None:
        parts.append(_section(f"sample ({facts['sample']['settings']})", f"<pre>{escape(facts['sample']['text'])}</pre>"))
    commands = "\n\n".join(f"# {command['to']}\n{command['type']}" for command in facts["next"])
    parts.append(_section("next", f"<pre>{escape(commands)}</pre>"))
    head = f'<meta charset="utf-8"><title>{escape(facts["run"])}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(rows: list[tuple[str, str]]) -> str:
    lines = (
        f"<tr{' class=model' if name == MODEL else ''}><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _loss_curve(curves: dict[str, list[list[float]]]) -> str:
    """The curves [(step, loss), ...] by name as a PNG in base64."""
    from matplotlib.figure import Figure  # the figure alone: pyplot would look for a display

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=name, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return base64.b64encode(image.getvalue()).decode("ascii")
