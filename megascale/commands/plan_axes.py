"""`megascale plan axes`: which N, D, P, E, k and K a budget should buy, by the scaling laws, with what the laws disagree on."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands.numbers import IMBALANCE, TOP, whole_numbers
from megascale.commands.written import save
from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.plan.axis_candidates import Axes, Workload
    from megascale.plan.axis_search import Limits

_OPTIONS = (
    "flops", "gpu_hours", "achieved", "memory", "latency", "unique", "served", "context", "sequence", "streams", "experts", "per_token",
    "blocks", "stream_share", "blocks_worth", "fit", "draws", "details", "design", "law",
)  # fmt: skip
_NOT_WITH_LAW = ("served", "per_token", "stream_share", "blocks_worth", "fit", "details", "plot", "write", "design")
_OF_LAYOUTS = {
    "config": None,
    "gpus": None,
    "tokens": None,
    "slurm": None,
    "top": TOP,
    "imbalance": IMBALANCE,
    "check": False,
    "weak": False,
}
"""what the verb takes for layouts and scaling, and its defaults"""
_DETAILS, _DRAWS = 3, 100
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1.0, "": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the search over axes takes beside --cluster and --json, which the verb has already."""
    group = parser.add_argument_group("plan axes", "which axes to spend a training budget on")
    add = group.add_argument
    add("--flops", type=float, metavar="C", help="budget of training, FLOPs; or --gpu-hours with --achieved")
    add("--gpu-hours", type=float, metavar="H", help="budget in GPU-hours")
    add("--achieved", type=float, metavar="F", help="FLOP/s that one GPU reaches in training: 4e14")
    add("--memory", metavar="SIZE", help="at inference: 24GiB, 80GB; default: what the cluster's device has")
    add("--latency", type=float, metavar="MS", help="most milliseconds a new token at batch 1")
    add("--unique", type=float, metavar="U", help="training tokens there are; more are repetitions")
    add("--served", type=float, metavar="I", help="tokens that the budget serves too")
    add("--context", type=int, metavar="T", help="tokens of context at inference; default: 4096")
    add("--sequence", type=int, metavar="S", help="tokens of a training sequence; default: 4096")
    add("--streams", metavar="P", help="values of P to try; default: 1,2,4,8")
    add("--experts", metavar="E", help="values of E to try; default: 1,8,16,32,64,128")
    add("--per-token", metavar="k", help="values of k to try; default: 1,2")
    add("--blocks", metavar="K", help="values of K to try; default: 1,2")
    add(
        "--stream-share", type=float, metavar="X", help="share of the tokens that have P streams, the others have one; default: 1"
    )
    add("--blocks-worth", metavar="K=A", help="a_K: 2=1.05,4=1.1; default: 1, or what --fit says")
    add("--fit", type=Path, nargs="+", metavar="FILE", help="fits of runs of yours (laws fit chinchilla|blocks --save FILE)")
    add("--draws", type=int, metavar="N", help=f"refits for the intervals; 0 = none; default: {_DRAWS}")
    add("--details", type=int, metavar="N", help=f"designs shown law by law; default: {_DETAILS}")
    add("--design", metavar="NAME", help='with --write: "3072x24 P1 E8 k2 K1", as the report names it; default: the best score')
    add("--law", choices=("compute-only",), help="what would follow if only compute counted, instead of the search")


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit code.

    Raises:
        InputError: see `facts_of`; the pictures or the run cannot be written.
    """
    facts = facts_of(arguments)
    if arguments.json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        for line in lines_of(facts, arguments):
            print(line)
    if arguments.plot is not None:
        from megascale.plan.axis_plots import plot_axes

        for path in plot_axes(facts["curves"], facts["iso_loss"], arguments.plot):
            print(f"wrote {path}", file=sys.stderr)
    if arguments.write is not None:
        save(arguments.write, facts["run"], "--write")
    return 0


def refuse_axis_options(arguments: argparse.Namespace) -> None:
    """For the verb without `axes`: InputError for options that only the search over axes reads."""
    given = [name for name in _OPTIONS if getattr(arguments, name) is not None]
    if given:
        raise InputError(_option(given[0]), "is read by the search over axes only", "megascale plan axes --flops C --memory SIZE")


def lines_of(facts: dict[str, Any], arguments: argparse.Namespace) -> Iterator[str]:
    """The report for people."""
    from megascale.plan.axis_text import axis_lines
    from megascale.plan.compute_limits import compute_only_lines

    details = _DETAILS if arguments.details is None else arguments.details
    return compute_only_lines(facts) if arguments.law else axis_lines(facts, details)


def facts_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report in plain values; with --plot also what the pictures show, as `curves` and `iso_loss`, and with --write the `run`.

    Raises:
        InputError: senseless, missing or unread values, an unknown device, a budget or limits that nothing fits.
    """
    from megascale.plan.axis_curves import axis_curves
    from megascale.plan.axis_report import axis_report
    from megascale.plan.axis_run import axis_run
    from megascale.plan.axis_search import search_axes
    from megascale.plan.cluster import load_cluster
    from megascale.plan.compute_limits import compute_only_report
    from megascale.plan.iso_loss import iso_loss
    from megascale.plan.own_fits import read_own

    _refuse_unread(arguments)
    if arguments.cluster is None:
        raise InputError("--cluster", "is missing", "name the device of inference: a100, h100, h200, b200, or a YAML file")
    draws = _DRAWS if arguments.draws is None else arguments.draws
    if draws < 0:
        raise InputError("--draws", f"{draws} is negative", "give 0 for no intervals, or for example 100")
    device = load_cluster(arguments.cluster)
    flops, axes, work = _budget(arguments), _axes(arguments), _work(arguments)
    limits = _limits(arguments, device.usable_bytes)
    if arguments.law:
        return compute_only_report(flops, device, limits, axes, work, draws)
    found = search_axes(
        flops, device, limits, axes, work, read_own(arguments.fit or (), _worth(arguments.blocks_worth or "")), draws
    )
    facts = axis_report(found, draws)
    if arguments.plot is not None:
        facts |= {"curves": axis_curves(found, draws), "iso_loss": iso_loss(found, draws)}
    if arguments.write is not None:
        facts["run"] = axis_run(found, arguments.design)
    return facts


def _refuse_unread(arguments: argparse.Namespace) -> None:
    """Options that would be parsed and ignored."""
    for name, default in _OF_LAYOUTS.items():
        if getattr(arguments, name, default) != default:
            raise InputError(_option(name), "is not read by the search over axes", "leave it out, or plan layouts without `axes`")
    if more := [word for word in getattr(arguments, "overrides", ()) if word != "axes"]:
        raise InputError(more[0], "is not read by the search over axes", "it has no run whose settings could change")
    for name in _NOT_WITH_LAW:
        if arguments.law and getattr(arguments, name) is not None:
            raise InputError(_option(name), f"is not read with --law {arguments.law}", "leave one of them out")
    if arguments.json and arguments.details is not None:
        raise InputError("--details", "is not read with --json, which holds everything", "leave it out")
    if arguments.design is not None and arguments.write is None:
        raise InputError("--design", "names what --write writes", "add --write FILE")
    if arguments.details is not None and arguments.details < 0:
        raise InputError("--details", f"{arguments.details} is negative", "give for example 3")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _budget(arguments: argparse.Namespace) -> float:
    hours, achieved = arguments.gpu_hours, arguments.achieved
    if (arguments.flops is None) == (hours is None):
        raise InputError("--flops", "the budget must be given once", "give --flops 1e22, or --gpu-hours 10000 --achieved 4e14")
    if arguments.flops is not None:
        if achieved is not None:
            raise InputError("--achieved", "has no use with --flops", "it turns --gpu-hours into FLOPs")
        return float(arguments.flops)
    for option, value in (("--gpu-hours", hours), ("--achieved", achieved)):
        if value is None or not 0 < value < math.inf:
            raise InputError(option, f"{value} is no positive number", "give --gpu-hours 10000 --achieved 4e14")
    return float(hours * 3600 * achieved)


def _limits(arguments: argparse.Namespace, usable: float) -> Limits:
    from megascale.plan.axis_search import Limits

    memory = usable if arguments.memory is None else _bytes(arguments.memory)
    if memory > usable:
        reason = f"{arguments.memory} is more than the {usable / 2**30:.3g} GiB that one device of the cluster has for a model"
        raise InputError("--memory", reason, "the search knows inference on one device: name a larger one, or give less")
    return Limits(
        memory=memory,
        latency=math.inf if arguments.latency is None else arguments.latency / 1e3,
        unique=math.inf if arguments.unique is None else arguments.unique,
        served=arguments.served or 0.0,
    )


def _bytes(text: str) -> float:
    number = text.strip().rstrip("abgikmtABGIKMT")
    unit = text.strip()[len(number) :].upper()
    try:
        return float(number) * _UNITS[unit]
    except (ValueError, KeyError) as error:
        raise InputError("--memory", f"{text!r} is no size", "give for example 24GiB or 80GB") from error


def _axes(arguments: argparse.Namespace) -> Axes:
    from megascale.plan.axis_candidates import Axes

    names = ("streams", "experts", "per_token", "blocks")
    lists: dict[str, Any] = {
        name: whole_numbers(_option(name), getattr(arguments, name)) for name in names if getattr(arguments, name) is not None
    }
    return replace(Axes(**lists), stream_share=1.0 if arguments.stream_share is None else arguments.stream_share)


def _work(arguments: argparse.Namespace) -> Workload:
    from megascale.plan.axis_candidates import Workload

    given = {name: getattr(arguments, name) for name in ("context", "sequence") if getattr(arguments, name) is not None}
    for name, tokens in given.items():
        if tokens < 1:
            raise InputError(_option(name), f"{tokens} is too small", "give for example 4096")
    return Workload(**given)


def _worth(text: str) -> dict[int, float]:
    worth = {}
    for part in filter(None, text.split(",")):
        blocks, _, value = part.partition("=")
        try:
            worth[int(blocks)] = float(value)
        except ValueError as error:
            raise InputError("--blocks-worth", f"{part!r} is not K=a_K", "give for example 2=1.05") from error
        if not 0 < worth[int(blocks)] < math.inf:
            raise InputError("--blocks-worth", f"a_K of {part} is no positive number", "give for example 2=1.05")
    return worth
