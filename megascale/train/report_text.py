"""The run report on a console: the same tables in a terminal and in a file, with colours in the terminal only."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megascale.observe.console import format_count, format_duration

_FILE_WIDTH = 110


def print_report(facts: dict[str, Any]) -> None:
    """Print the facts of `megascale.train.run_report.collect` on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_FILE_WIDTH)
    console.print(
        Text(f"run {facts['run']}, step {facts['step']}", style="bold"), Text(f"files in {facts['folder']}\n"), sep="\n"
    )
    _print_table(console, "training", training_rows(facts["training"], facts["ended"]), "left")
    for source, found in facts["held_out"].items():
        rows = [(name, f"{bits:.3f} bits per byte") for name, bits in held_out_rows(found)]
        _print_table(console, held_out_title(source, found), rows, "right")
    counts = [(name.replace("_", " "), f"{count:,}") for name, count in facts["parameters"].items()]
    _print_table(console, "parameters", counts, "right")
    if facts["sample"] is not None:
        console.print(Text(f"sample ({facts['sample']['settings']})", style="bold"))
        text, prompt = Text(facts["sample"]["text"] + "\n"), facts["sample"]["prompt"]
        if facts["sample"]["text"].startswith(prompt):
            text.stylize("dim", 0, len(prompt))
        console.print(text)
    console.print(Text("next", style="bold"))
    for command in facts["next"]:
        console.print(Text(f"  {command['to']}:\n    {command['type']}"), soft_wrap=True)


MODEL = "this model"
"""The row of the run among the compressors."""


def training_rows(training: dict[str, Any], ended: str) -> list[tuple[str, str]]:
    """Names and values of the training table."""
    rows = [
        ("steps", f"{training['steps']:,} of {training['planned_steps']:,} ({ended})"),
        ("tokens", f"{training['tokens']:,}"),
        ("training loss", f"{training['first_loss']:.4f} -> {training['last_loss']:.4f} nats per token"),
        ("time in steps", format_duration(training["seconds"])),
    ]
    if training["tokens_per_second"] is not None:
        rows.append(("speed", f"{format_count(training['tokens_per_second'])} tokens/s"))
    if training["mfu"] is not None:
        rows.append(("model FLOPs utilisation", f"{100 * training['mfu']:.1f} %"))
    elif training["tflops_per_device"] is not None:
        rows.append(("model FLOP/s", f"{training['tflops_per_device']:.3f} TFLOP/s a device"))
    if training["device"] is not None:
        rows.append(("devices", f"{training['devices']} x {training['device']}"))
    return rows


def held_out_title(source: str, found: dict[str, Any]) -> str:
    """The model's loss on a held-out text, in words."""
    tokens = f"{'all' if found['all_scored'] else 'the first'} {found['tokens']:,} tokens"
    return f"held-out text of {source}, {tokens}: loss {found['loss']:.4f}, perplexity {found['perplexity']:,.2f}"


def held_out_rows(found: dict[str, Any]) -> list[tuple[str, float]]:
    """The model and the compressors by bits per byte, best first; empty where bytes are not known."""
    rows = [(MODEL, found["bits_per_byte"])] if found["bits_per_byte"] is not None else []
    compressors = found["compressors"] or {"bits_per_byte": {}}
    for name, bits in compressors["bits_per_byte"].items():
        primed = f" with {compressors['primer_bytes']:,} bytes of training text" if name.endswith("primed") else ""
        rows.append((name + primed, bits))
    return sorted(rows, key=lambda row: row[1])


def _print_table(console: Console, title: str, rows: list[tuple[str, str]], justify: Literal["left", "right"]) -> None:
    """A title and two columns; outside the table, so that a long title does not stretch or break in it."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(justify=justify)
    for name, value in rows:
        table.add_row(Text(name), Text(value), style="bold green" if name == MODEL else None)
    console.print(table)
    console.print()
