"""Strong and weak scaling: the best layout of a run at each of several numbers of GPUs, and what is lost beside the smallest.

Strong: the tokens of a step stay. Weak: they grow with the GPUs; the run's batch is that of the smallest number. Efficiency is tokens a
second and GPU over that of the smallest number that has a layout, in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megascale.config.errors import InputError
from megascale.config.layout_search import nearest
from megascale.config.schema import Config
from megascale.model.accounting import active_parameters, parameters
from megascale.plan.cluster import Cluster
from megascale.plan.layouts import Found, can_be_laid_out, search
from megascale.plan.published import largest_run
from megascale.plan.report import layout_facts

USUAL = (8, 64, 512, 4096, 16384, 32768, 65536, 100_000)
"""Numbers of GPUs where none are given; each gives way to the next smaller one that can be laid out."""
MOST_GPUS = 2**20


@dataclass(frozen=True)
class LeftOut:
    """A number of GPUs that trains nothing."""

    gpus: int
    reason: str
    remedy: str


@dataclass(frozen=True)
class Scaling:
    """The fastest layout at each number of GPUs."""

    weak: bool
    found: tuple[Found, ...]
    """fewest GPUs first"""
    left_out: tuple[LeftOut, ...]


def scale(
    config: Config,
    cluster: Cluster,
    gpus: Sequence[int],
    weak: bool = False,
    imbalance: float = 1.0,
    tokens: float | None = None,
) -> Scaling:
    """Plan the run at each number of GPUs.

    Args:
        config: resolved; knows the vocabulary's size. Its layout and micro-batches are not read.
        gpus: numbers of GPUs.
        weak: the batch grows with them.
        imbalance: rows of the fullest rank's experts over an even share.
        tokens: of the run, in place of those of its steps.

    Raises:
        InputError: a number below 1 or above `MOST_GPUS`, none that trains the run, or a run that the planner does not know.
    """
    counts = sorted(set(gpus))
    if not counts or counts[0] < 1 or counts[-1] > MOST_GPUS:
        raise InputError("--gpus", f"{list(gpus)} are no numbers of GPUs", f"give for example 8,64,512; at most {MOST_GPUS:,}")
    found: list[Found] = []
    left_out: list[LeftOut] = []
    for count in counts:
        batch = _batch_of(config, count, counts[0], weak)
        if batch is None:
            reason = f"{config.batch.sequences} sequences a step at {counts[0]:,} GPUs grow to no whole number"
            left_out.append(LeftOut(count, reason, f"take a multiple of {counts[0]:,} GPUs"))
        elif not can_be_laid_out(batch, cluster, count):
            left_out.append(_without_layout(config, batch, cluster, count, counts[0], weak))
        else:
            try:
                found.append(search(batch, cluster, count, 1, imbalance, tokens).found[0])
            except InputError as error:
                if error.place != f"--gpus {count}":  # of the run itself: no other number would do
                    raise
                left_out.append(LeftOut(count, error.reason, error.remedy))
    if not found:
        first = left_out[0]
        raise InputError(f"--gpus {first.gpus}", first.reason, first.remedy)
    return Scaling(weak, tuple(found), tuple(left_out))


def usual_counts(config: Config, cluster: Cluster, weak: bool = False) -> list[int]:
    """The usual numbers of GPUs, as far as they can be laid out; else the next smaller number of whole nodes that can."""
    node = cluster.devices_per_node
    counts: list[int] = []
    for wanted in USUAL:
        smallest = counts[0] if counts else wanted // node * node
        works = _works(config, cluster, smallest, weak)
        fits = (nodes * node for nodes in range(wanted // node, 0, -1) if works(nodes * node))
        chosen = wanted if wanted % node == 0 and works(wanted) else next(fits, None)
        if chosen is not None:
            counts.append(chosen)
    if not counts:
        reason = f"no number of whole nodes lays out {config.batch.sequences} sequences a step"
        raise InputError("--gpus", reason, "name numbers of GPUs, or change batch.sequences")
    return sorted(set(counts))


def _batch_of(config: Config, gpus: int, smallest: int, weak: bool) -> Config | None:
    """The run with the batch of so many GPUs, its ramp too; none where that is no whole number of sequences."""
    if not weak or gpus == smallest:
        return config
    batch = config.batch
    sizes = [batch.sequences, *(stage.sequences for stage in batch.ramp)]
    if any(size * gpus % smallest for size in sizes):
        return None
    grown = [size * gpus // smallest for size in sizes]
    ramp = tuple(stage.model_copy(update={"sequences": size}) for stage, size in zip(batch.ramp, grown[1:], strict=True))
    return config.model_copy(update={"batch": batch.model_copy(update={"sequences": grown[0], "ramp": ramp})})


def _works(config: Config, cluster: Cluster, smallest: int, weak: bool) -> Callable[[int], bool]:
    def works(gpus: int) -> bool:
        batch = _batch_of(config, gpus, smallest, weak)
        return batch is not None and can_be_laid_out(batch, cluster, gpus)

    return works


def _without_layout(config: Config, batch: Config, cluster: Cluster, gpus: int, smallest: int, weak: bool) -> LeftOut:
    """Why, and the nearest numbers of whole nodes that can be laid out."""
    works, node = _works(config, cluster, smallest, weak), cluster.devices_per_node
    step = node if gpus > node else 1
    near = [nodes * step for nodes in nearest(-(-gpus // step), lambda nodes: works(nodes * step), 2 * gpus // step)]
    shared = f"{batch.batch.sequences:,} sequences a step, {config.model.layers} layers and {config.model.heads} heads"
    known = f"the nearest numbers of GPUs: {' and '.join(f'{count:,}' for count in near)}" if near else "take fewer GPUs"
    return LeftOut(gpus, f"{shared} cannot be shared evenly", f"{known}; or change batch.sequences")


# Facts --------------------------------------------------------------------------------------------------------------------


def scaling_facts(scaling: Scaling, cluster: Cluster, tokens: float) -> dict[str, Any]:
    """Everything in plain values: seconds, tokens, FLOPs."""
    first = scaling.found[0]
    model = first.config.model
    reference = _rate(first)
    rows = [_row(found, cluster, tokens, reference) for found in scaling.found]
    beyond = largest_run()
    return {
        "run": first.config.run.name,
        "cluster": cluster.name,
        "scaling": "weak" if scaling.weak else "strong",
        "parameters": {"total": parameters(model).total, "active": active_parameters(model)},
        "tokens": tokens,
        "compared_up_to": beyond,
        "points": rows,
        "left_out": [vars(one) for one in scaling.left_out],
        "notes": list(_notes(scaling, cluster, beyond)),
    }


def _rate(found: Found) -> float:
    """Tokens a second and GPU, mean over the run."""
    return found.tokens / found.seconds / found.plan.world


def _row(found: Found, cluster: Cluster, tokens: float, reference: float) -> dict[str, Any]:
    plan, rate = found.plan, _rate(found)
    facts = layout_facts(found, cluster, tokens)
    return {
        "gpus": plan.world,
        "sequences": found.config.batch.sequences,
        "step_tokens": plan.step_tokens,
        "tokens_per_second": rate * plan.world,
        "ideal_tokens_per_second": reference * plan.world,
        "efficiency": rate / reference,
        "useful_tokens_per_second": rate * plan.world * facts["cost"]["goodput"]["share"],
        "shares": found.time.shares,
        **facts,
    }


def _notes(scaling: Scaling, cluster: Cluster, beyond: int) -> list[str]:
    smallest, largest = scaling.found[0].plan.world, scaling.found[-1].plan.world
    said = [f"efficiency: tokens/s a GPU over those of {smallest:,} GPUs; days and goodput count a failure of a node every"]
    said[0] += f" {cluster.hours_between_failures:,.0f} h"
    if len(scaling.found[0].parts) > 1:
        said.append(
            "tokens/step, s/step and its parts are those of the kind of step that takes most FLOPs; the others are of the run"
        )
    if largest > beyond:
        said.append(f"above {beyond:,} GPUs: more than any published run that the planner was fitted to or judged by")
        wait = f"{cluster.efficiency.straggle:.0%}"
        said.append(f"the network is flat, and the slowest replica is waited for {wait} of a step, at any number of nodes")
    if scaling.found[0].plan.model.experts.count > 1:
        said.append("the number of micro-batches differs: with routed experts it is part of what is trained (docs/routing.md)")
    if scaling.weak:
        said.append("a larger step trains less with each token from some size on, which is not counted")
    return said
