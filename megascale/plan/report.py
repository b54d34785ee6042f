"""A plan and the planner's errors as plain values, and as text for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megascale.model.accounting import active_parameters, parameters
from megascale.observe.console import format_count
from megascale.plan.cluster import Cluster
from megascale.plan.goodput import Goodput, goodput
from megascale.plan.layouts import Found, PlannedPart, Search, changed, describe
from megascale.plan.memory import worst_rank
from megascale.plan.published import Check, summaries
from megascale.plan.rank import Plan

GIB = 2**30
WAITS = {
    "passes": "passes over memory between the matrix products (norms, activations, the loss): larger products hide none of it",
    "recompute": "the forward pass computed again: more memory, or more ways to share it, would save it",
    "tp": "messages of tensor parallelism: smaller tp, or faster links in a node",
    "cp": "messages of context parallelism: smaller cp, or more key/value sharing",
    "stream": "messages of stream parallelism: smaller stream",
    "ep": "rows on their way to experts and back: smaller ep, or shared experts to compute meanwhile",
    "pp": "states on their way between pipeline stages: fewer stages a rank",
    "dp": "gradients and new weights of data-parallel ranks: more tokens a step, or a faster network",
    "optimizer": "the optimizer's pass over its state: more ranks to share it (ZeRO), or more tokens a step",
    "bubble": "ranks of the pipeline that wait for each other: more micro-batches, or fewer pipeline ranks",
    "straggle": "replicas that wait for the slowest",
    "compute": "the model's own matrix products and attention",
}
"""What each part of a step is, and what would shrink it."""


@dataclass(frozen=True)
class Cost:
    """Of a whole training."""

    tokens: float
    days: float | None
    """of wall time, failures included; none = the run never finishes"""
    gpu_hours: float | None
    price: float | None
    """dollars; none also where the cluster has no price"""
    goodput: Goodput


def cost(found: Found, cluster: Cluster, tokens: float) -> Cost:
    """What so many tokens cost in a layout; other tokens than the run's take its steps in the run's proportions."""
    plan = found.plan
    nodes = -(-plan.world // cluster.devices_per_node)
    useful = goodput(cluster, nodes, parameters(found.config.model).total, found.config.checkpoint.background)
    if not useful.finishes:
        return Cost(tokens, None, None, None, useful)
    seconds = tokens / found.tokens * found.seconds / useful.share
    hours = seconds / 3600 * plan.world
    price = hours * cluster.price_per_hour if cluster.price_per_hour is not None else None
    return Cost(tokens, seconds / 86400, hours, price, useful)


def reasons(found: Found, cluster: Cluster) -> list[str]:
    """Why this layout: what binds, what its settings save."""
    time, memory, parallel = found.time, found.memory, found.config.parallel
    share = time.shares.get(time.binds)
    said = [f"binds: {time.binds}{'' if share is None else f' {share:.0%}'}: {WAITS[time.binds]}"]
    room = cluster.usable_bytes - memory.total
    said.append(f"memory: {memory.total / GIB:.0f} GiB on pipeline rank {found.rank}, {room / GIB:.0f} GiB left")
    if parallel.recompute != "none":
        whole = _memory_with(found, cluster, recompute="none")
        said.append(f"recompute {parallel.recompute}: without it {whole / GIB:.0f} GiB")
    if parallel.zero_stage:
        whole = _memory_with(found, cluster, zero_stage=0)
        said.append(f"ZeRO {parallel.zero_stage}: without it {whole / GIB:.0f} GiB")
    if parallel.pp > 1:
        said.append(f"pipeline: ranks wait {time.bubble / time.total:.0%} of the step")
    return said


def _memory_with(found: Found, cluster: Cluster, **layout: Any) -> float:
    plans = (Plan(changed(part.plan.config, layout), found.plan.world) for part in found.parts)
    return max(worst_rank(plan, fragmentation=cluster.efficiency.fragmentation)[1].total for plan in plans)


# Plans --------------------------------------------------------------------------------------------------------------------


def plan_facts(result: Search, cluster: Cluster, tokens: float, seconds: float) -> dict[str, Any]:
    """Everything in plain values: bytes, seconds, FLOPs."""
    best = result.found[0]
    first, model = best.plan, best.config.model
    return {
        "run": first.config.run.name,
        "cluster": cluster.name,
        "gpus": first.world,
        "parameters": {"total": parameters(model).total, "active": active_parameters(model)},
        "step": {"tokens": first.step_tokens, "flops": first.flops},
        "training": {"tokens": tokens, "flops": best.flops * tokens / best.tokens},
        "search": {"tried": result.tried, "too_large": result.too_large, "left_out": result.too_slow, "seconds": seconds},
        "layouts": [layout_facts(found, cluster, tokens) for found in result.found],
    }


def layout_facts(found: Found, cluster: Cluster, tokens: float) -> dict[str, Any]:
    """One layout in plain values: bytes, seconds, what it costs to train on so many tokens."""
    parallel, plan = found.config.parallel, found.plan
    spent = cost(found, cluster, tokens)
    return {
        "layout": describe(found.config, plan.world),
        "parallel": {**parallel.model_dump(), "dp": plan.dp},
        "micro_batches": plan.micro_batches,
        "step_seconds": found.time.total,
        "tokens_per_second_per_gpu": found.tokens / found.seconds / plan.world,
        "mfu": found.rate / cluster.peak_flops,
        "time": vars(found.time),
        "parts": [_part_facts(part) for part in found.parts],
        "memory": {**vars(found.memory), "total": found.memory.total, "rank": found.rank},
        "binds": found.time.binds,
        "reasons": reasons(found, cluster),
        "cost": {**vars(spent), "goodput": vars(spent.goodput)},
    }


def _part_facts(part: PlannedPart) -> dict[str, Any]:
    """Steps that cost alike; tokens, FLOPs and seconds are those of one."""
    plan = part.plan
    return {
        "steps": part.steps,
        "streams": plan.model.streams.count,
        "sequences": plan.config.batch.sequences,
        "tokens": plan.step_tokens,
        "flops": plan.flops,
        "step_seconds": part.time.total,
        "memory": part.memory.total,
    }


def print_plan(facts: dict[str, Any], console: Console) -> None:
    """The layouts as a table, then the parts of the first one."""

    def line(text: str, style: str = "") -> None:
        console.print(text, highlight=False, markup=False, style=style, soft_wrap=True)

    step, tried = facts["step"], facts["search"]
    line(f"plan of {facts['run']} on {facts['gpus']:,} x {facts['cluster']}")
    sizes = facts["parameters"]
    line(f"parameters  {format_count(sizes['total'])}, {format_count(sizes['active'])} active")
    several = len(facts["layouts"][0]["parts"]) > 1
    which = ", of those that take most FLOPs together; s/step is theirs" if several else ""
    line(f"step        {step['tokens']:,} tokens, {step['flops']:.3g} FLOPs{which}")
    line(f"training    {facts['training']['tokens']:.3g} tokens, {facts['training']['flops']:.3g} FLOPs")
    bounds = f"{tried['too_large']:,} too large, {tried['left_out']:,} left out by bounds"
    line(f"search      {tried['tried']:,} layouts in {tried['seconds']:.1f} s: {bounds}")
    table = Table("", "s/step", "MFU", "GiB", "binds", "days", "layout", title="fastest layouts that fit", title_justify="left")
    for number, one in enumerate(facts["layouts"], 1):
        memory, days = one["memory"]["total"] / GIB, one["cost"]["days"]
        wall = "never" if days is None else f"{days:.1f}"
        row = (str(number), f"{one['step_seconds']:.3f}", f"{one['mfu']:.1%}", f"{memory:.0f}", one["binds"], wall)
        table.add_row(*row, one["layout"])
    console.print(table)
    best = facts["layouts"][0]
    line("why the first one")
    for reason in best["reasons"]:
        line(f"  {reason}")
    if several:
        console.print(_parts_table(best["parts"]))
    title = f"its step of {step['tokens']:,} tokens" if several else "its step"
    parts = Table("part", "seconds", "share", title=title, title_justify="left")
    for name, seconds in sorted(best["time"].items(), key=lambda part: -part[1]):
        if seconds > 0:
            parts.add_row(name, f"{seconds:.4f}", f"{seconds / best['step_seconds']:.1%}")
    console.print(parts)
    line(_memory_line(best["memory"]))
    line(_cost_line(best["cost"]))


def _parts_table(parts: list[dict[str, Any]]) -> Table:
    table = Table("steps", "P", "tokens/step", "FLOPs/step", "s/step", "days", "GiB", title="its steps", title_justify="left")
    for part in parts:
        days = part["steps"] * part["step_seconds"] / 86400
        sizes = (f"{part['steps']:,.0f}", f"{part['streams']}", f"{part['tokens']:,}", f"{part['flops']:.3g}")
        table.add_row(*sizes, f"{part['step_seconds']:.3f}", f"{days:.2f}", f"{part['memory'] / GIB:.0f}")
    return table


def _memory_line(memory: dict[str, float]) -> str:
    names = ("parameters", "gathered", "gradients", "optimizer", "activations", "imbalance", "fragmentation")
    parts = ", ".join(f"{name} {memory[name] / GIB:.1f}" for name in names if memory[name])
    return f"its memory, GiB: {parts}"


def _cost_line(spent: dict[str, Any]) -> str:
    useful, price, between = spent["goodput"], spent["price"], spent["goodput"]["hours_between_failures"]
    failure = f"a failure every {between:.1f} h" if between >= 1 else f"a failure every {between:.2g} h"
    if spent["days"] is None:
        return f"{spent['tokens']:.3g} tokens: the run never finishes: {failure} leaves no time to train"
    text = f"{spent['tokens']:.3g} tokens: {spent['days']:.1f} days, {spent['gpu_hours']:,.0f} GPU hours"
    text += f", ${price:,.0f}" if price is not None else ""
    text += f"; goodput {useful['share']:.1%}: {failure}"
    interval = useful["interval_seconds"] / 60
    return f"{text}, a checkpoint every {interval:.1f} min ({useful['checkpoint_seconds']:.1f} s each)"


# Errors -------------------------------------------------------------------------------------------------------------------


def check_facts(found: list[Check]) -> dict[str, Any]:
    """Every row with its error, and the medians."""
    rows = [{**vars(check), "error": check.error, "explanation": check.explanation} for check in found]
    return {"rows": rows, "summary": [vars(summary) for summary in summaries(found)]}


def print_checks(facts: dict[str, Any], console: Console) -> None:
    """A table for each published one, and the medians."""
    for name in dict.fromkeys(row["table"] for row in facts["rows"]):
        table = Table("row", "published", "planned", "error", "", title=name, title_justify="left")
        for row in facts["rows"]:
            if row["table"] == name:
                use = "fitted" if row["fitted"] else "judged"
                numbers = (f"{row['published']:.2f}", f"{row['planned']:.2f}", f"{row['error']:+.1%}")
                table.add_row(row["row"], *numbers, row["explanation"] or use)
        console.print(table)
    for one in facts["summary"]:
        which = "rows the constants were fitted to" if one["fitted"] else "rows that judge"
        errors = f"median {one['median']:.1%}, largest {one['worst']:.1%}, above 25 % unexplained: {one['unexplained']}"
        console.print(f"{one['kind']}, {one['rows']} {which}: {errors}", highlight=False, markup=False, soft_wrap=True)
