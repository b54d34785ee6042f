"""A dry run as tables for people, and as one JSON object."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megascale.config.layout import WORLD_AXES
from megascale.observe.console import format_count
from megascale.parallel.ledger import Entry
from megascale.parallel.mesh import STAGE, Layout, Ranks
from megascale.train.dry_run import DryRun, RankReport


def as_json(found: DryRun) -> dict[str, Any]:
    """Everything in plain values: bytes, FLOPs, numbers of calls."""
    parallel = found.config.parallel
    return {
        "run": found.config.run.name,
        "world": found.layout.world,
        "layout": {**found.layout.sizes, "ep": found.layout.ep, "etp": found.layout.etp},
        "zero_stage": found.zero_stage,
        "schedule": parallel.schedule if found.layout.sizes["pp"] > 1 else None,
        "micro_batches": found.config.batch.micro_batches,
        "bubble": found.bubble,
        "parameters": {"total": found.parameters, "active": found.active_parameters},
        "flops": {"step": found.flops, "rank": found.flops / found.layout.world},
        "ranks": [_rank_json(report) for report in found.ranks],
        "assumed": found.assumed,
        "warnings": found.warnings,
    }


def _rank_json(report: RankReport) -> dict[str, Any]:
    memory = report.memory
    return {
        "rank": report.rank,
        "stages": [{"stage": stage, "layers": layers} for stage, layers in report.layers.items()],
        "parameters": report.parameters,
        "memory": {**vars(memory), "total": memory.total},
        "sent": [{**vars(entry), "sent": float(entry.sent), "exposed": float(entry.exposed)} for entry in report.sent],
    }


def print_dry_run(found: DryRun, console: Console) -> None:
    """Layout, memory, FLOPs and traffic."""
    config, layout, world = found.config, found.layout, found.layout.world
    tokens = config.batch.sequences * config.data.sequence_length
    batch = f"{config.batch.micro_batches} micro-batches of {config.batch.sequences // config.batch.micro_batches} sequences"
    lines = [
        f"dry run of {config.run.name} on {world:,} rank{'s' * (world > 1)}: nothing is trained, nothing is written",
        f"parameters  {found.parameters:,} total, {found.active_parameters:,} active; {config.precision}",
        f"step        {tokens:,} tokens in {batch}",
        f"FLOPs       {found.flops:.4g} a step, {found.flops / world:.4g} a rank (model FLOPs, forward and backward)",
        f"engine      {f'DeepSpeed, ZeRO {found.zero_stage}' if found.zero_stage else 'plain torch (ZeRO 0)'}",
    ]
    if layout.sizes["pp"] > 1:
        lines.append(f"pipeline    {config.parallel.schedule}, ranks wait {found.bubble:.1%} of a step")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    for table in (_layout_table(layout), _memory_table(found.ranks), _traffic_table(found.ranks)):
        console.print()
        console.print(table)
    rings = "counted is what leaves the rank under ring algorithms: all-gather, reduce-scatter, all-to-all (n-1)/n, all-reduce twice that"
    console.print(rings, highlight=False, markup=False, style="dim")
    for note in found.assumed:
        console.print(f"assumed: {note}", highlight=False, markup=False, style="dim")


def _layout_table(layout: Layout) -> Table:
    table = Table("axis", "ranks", "groups", "the first group", "shares", title="layout", title_justify="left")
    shares = {
        "tp": "a layer's matrices; tokens between them",
        "cp": "a sequence's tokens",
        "stream": "the streams",
        "dp": "the sequences of a micro-batch",
        "pp": "the layers",
        "ep": "the experts",
        "etp": "each expert's width",
    }
    groups: dict[str, Ranks] = {axis: layout.along(0, axis) for axis in reversed(WORLD_AXES)}
    groups["ep"] = layout.expert_peers(0)
    groups["etp"] = groups["tp"] if layout.etp > 1 else (0,)
    for axis, ranks in groups.items():
        if len(ranks) > 1:
            table.add_row(axis, str(len(ranks)), f"{layout.world // len(ranks):,}", some_ranks(ranks), shares[axis])
    stage = layout.along(0, *STAGE)
    table.add_row("", str(len(stage)), str(layout.sizes["pp"]), some_ranks(stage), "one pipeline stage")
    return table


def some_ranks(ranks: Ranks) -> str:
    """`0`, `0, 8`, `0-7`, `0, 8, ..., 56`."""
    steps = {after - before for before, after in zip(ranks, ranks[1:], strict=False)}
    if len(ranks) < 3:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}-{ranks[-1]}" if steps == {1} else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"


def _memory_table(ranks: list[RankReport]) -> Table:
    heads = ("rank", "stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "total")
    table = Table(*heads, title="memory of one rank of each pipeline rank, GiB", title_justify="left")
    for report in ranks:
        memory = report.memory
        sizes = (memory.parameters + memory.gathered, memory.gradients, memory.optimizer, memory.activations, memory.total)
        stages, layers = zip(*((str(stage), _layers(layers)) for stage, layers in report.layers.items()), strict=True)
        row = (str(report.rank), ", ".join(stages), ", ".join(layers), format_count(report.parameters))
        table.add_row(*row, *(f"{size / 2**30:.3f}" for size in sizes))
    return table


def _layers(layers: list[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else "".join(map(str, layers))


def _traffic_table(ranks: list[RankReport]) -> Table:
    columns = [f"rank {report.rank}" for report in ranks]
    table = Table("axis", "kind", "of ranks", "calls", *columns, title="sent by one rank in one step, MiB", title_justify="left")
    found: dict[tuple[str, str, int], dict[int, Entry]] = {}
    for report in ranks:
        for entry in report.sent:
            found.setdefault((entry.axis, entry.kind, entry.ranks), {})[report.rank] = entry
    for (axis, kind, size), by_rank in sorted(found.items()):
        calls = {entry.calls for entry in by_rank.values()}
        numbers = [by_rank.get(report.rank) for report in ranks]
        row = (axis, kind, str(size), f"{min(calls):,}" if len(calls) == 1 else f"{min(calls):,}-{max(calls):,}")
        table.add_row(*row, *("" if entry is None else _mebibytes(entry) for entry in numbers))
    return table


def _mebibytes(entry: Entry) -> str:
    exposed = f" ({float(entry.exposed) / 2**20:,.3f} exposed)" if entry.hidden else ""
    return f"{float(entry.sent) / 2**20:,.3f}{exposed}"
