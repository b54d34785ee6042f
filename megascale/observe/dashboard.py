"""The W&B dashboard as code: sections of panels over registered metrics, and their conversion to a workspace."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megascale.config.errors import InputError
from megascale.config.inactive import ROUTER_ONLY
from megascale.config.schema import Config, Experts
from megascale.observe.metrics import name_regex

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

Feature = Literal[
    "validation",
    "streams",
    "phases",
    "experts",
    "balance_loss",
    "z_loss",
    "capacity",
    "s_base",
    "rl_r",
    "altup",
    "blocks",
    "accelerator",
    "known_peak",
    "cpu",
]
"""What a run must have for a panel to show anything. known_peak: a device whose peak FLOP/s is known."""


@dataclass(frozen=True)
class Panel:
    """A line plot of all metrics that match the patterns, over one axis."""

    title: str
    metrics: tuple[str, ...]
    x: Literal["tokens", "flops_total", "step"] = "tokens"
    needs: Feature | None = None


@dataclass(frozen=True)
class Section:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]


_ROUTED = "moe/layer_{layer}/"

SECTIONS: tuple[Section, ...] = (
    Section(
        "Loss",
        (
            Panel("Training loss over tokens", ("train/lm_loss",)),
            Panel("Training loss over FLOPs", ("train/lm_loss",), x="flops_total"),
            Panel("Training loss over steps", ("train/lm_loss",), x="step"),
            Panel("Total loss, auxiliary losses included", ("train/total_loss",)),
        ),
    ),
    Section(
        "Validation",
        (
            Panel("Validation loss over tokens", ("val/{source}/loss",), needs="validation"),
            Panel("Validation loss over FLOPs", ("val/{source}/loss",), x="flops_total", needs="validation"),
            Panel("Bits per byte", ("val/{source}/bits_per_byte",), needs="validation"),
        ),
    ),
    Section(
        "Optimizer",
        (
            Panel("Gradient norm before clipping", ("train/grad_norm",)),
            Panel("Loss bump of a phase", ("phase/loss_bump",), needs="phases"),
            Panel("Tokens until a phase recovers", ("phase/tokens_to_recover",), needs="phases"),
            Panel("Learning rate by group", ("optim/lr/{group}",)),
        ),
    ),
    Section(
        "Throughput",
        (
            Panel("Tokens per second", ("perf/tokens_per_second",)),
            Panel("Tokens per second and device", ("perf/tokens_per_second_per_gpu",)),
            Panel("TFLOP/s per device", ("perf/tflops_per_gpu",)),
            Panel("Model FLOPs utilisation", ("perf/mfu", "perf/mfu_full", "perf/hfu"), needs="known_peak"),
            Panel("Seconds per step", ("perf/step_seconds",), x="step"),
            Panel("Seconds waiting for data and checkpoints", ("perf/data_seconds", "perf/checkpoint_seconds"), x="step"),
        ),
    ),
    Section(
        "Memory",
        (
            Panel("Peak device memory, GiB", ("memory/peak_gib",), x="step", needs="accelerator"),
            Panel("Resident memory, GiB", ("memory/rss_gib",), x="step", needs="cpu"),
        ),
    ),
    Section(
        "Streams (ParScale)",
        (
            Panel("Entropy of the aggregator", ("streams/aggregator_entropy",), needs="streams"),
            Panel("Cosine between the streams' final states", ("streams/correlation",), needs="streams"),
            Panel("Weight of each stream", ("streams/weight_p{p}",), needs="streams"),
        ),
    ),
    Section(
        "Routing",
        (
            Panel("Busiest expert over mean, by layer", (_ROUTED + "load_max_over_mean",), needs="experts"),
            Panel("Entropy of the load, by layer", (_ROUTED + "load_entropy",), needs="experts"),
            Panel("Idle experts, by layer", (_ROUTED + "idle_experts",), needs="experts"),
            Panel("Balance loss", ("train/aux/balance",), needs="balance_loss"),
            Panel("Router z-loss", ("train/aux/router_z",), needs="z_loss"),
            Panel("Dropped choices, by layer", (_ROUTED + "dropped_share",), needs="capacity"),
            Panel("Column error of the Sinkhorn plan, by layer", (_ROUTED + "residual",), needs="s_base"),
            Panel("Noise of the policy gradient, by layer", (_ROUTED + "policy_noise",), needs="rl_r"),
            Panel("Losses of the policy", ("train/aux/policy", "train/aux/baseline", "train/aux/entropy"), needs="rl_r"),
        ),
    ),
    Section(
        "AltUp",
        (
            Panel("Divergence of the blocks, by layer", ("altup/layer_{layer}/divergence",), needs="blocks"),
            Panel(
                "Gain of the mixes, by layer",
                ("altup/layer_{layer}/forward_gain", "altup/layer_{layer}/backward_gain"),
                needs="blocks",
            ),
            Panel("Correction gain", ("altup/gain",), needs="altup"),
        ),
    ),
    Section(
        "Data",
        (
            Panel("Epoch of each source", ("data/epoch/{source}",)),
            Panel("Share of each source", ("data/share/{source}",)),
            Panel("Sequences", ("sequences",), x="step"),
        ),
    ),
    Section(
        "Guard",
        (
            Panel("Skipped steps", ("guard/skipped_steps",), x="step"),
            Panel("Starts of the run (lineage)", ("lineage",), x="step"),
            Panel("Phase of the schedule", ("phase",), x="step"),
        ),
    ),
)


def panel_metrics(panel: Panel, logged: Iterable[str]) -> dict[str, list[str]]:
    """For each pattern of a panel the logged names that match it, sorted; an empty list where none does."""
    names = sorted(logged)
    return {pattern: [name for name in names if re.match(name_regex(pattern), name)] for pattern in panel.metrics}


def missing_panels(logged: set[str], features: frozenset[str]) -> list[str]:
    """The panels that should show something for a run with these features and lack a metric.

    Args:
        logged: names of the metrics the run logged, in any step.
        features: what the run has; see `run_features`.

    Returns:
        "Section: panel: pattern" for each pattern without a logged metric, and for a panel whose x axis is not logged.
    """
    return [
        f"{section.title}: {panel.title}: {pattern}"
        for section in SECTIONS
        for panel in section.panels
        if panel.needs is None or panel.needs in features
        for pattern, names in ({panel.x: [panel.x] if panel.x in logged else []} | panel_metrics(panel, logged)).items()
        if not names
    ]


def run_features(config: Config, on_accelerator: bool, peak_known: bool) -> frozenset[Feature]:
    """The features of a run.

    Args:
        config: the run's config.
        on_accelerator: whether the model is on a device with its own memory.
        peak_known: whether the device's peak FLOP/s is known.
    """
    present: dict[Feature, bool] = {
        "validation": config.validation.every > 0,
        "streams": config.model.streams.count > 1,
        "phases": len(config.schedule.phases) > 1,
        "experts": config.model.experts.count > 1,
        **_routing_features(config.model.experts),
        "altup": config.model.altup.blocks > 1 or config.model.altup.form == "sequence",
        "blocks": config.model.altup.blocks > 1,
        "accelerator": on_accelerator,
        "cpu": not on_accelerator,
        "known_peak": peak_known,
    }
    return frozenset(feature for feature, is_present in present.items() if is_present)


def _routing_features(experts: Experts) -> dict[Feature, bool]:
    routed, router = experts.count > 1, experts.router
    by_bias = router == "sigmoid" and not experts.balance_loss
    return {
        "balance_loss": routed and router in ROUTER_ONLY["balance_loss"] and not by_bias,
        "z_loss": routed and router in ROUTER_ONLY["z_loss"],
        "capacity": routed and experts.capacity_factor is not None,
        "s_base": routed and router == "s_base",
        "rl_r": routed and router == "rl_r",
    }


def build_workspace(entity: str, project: str) -> Workspace:
    """The dashboard as a W&B workspace, not yet saved.

    Args:
        entity: team or user.
        project: project of the runs.

    Raises:
        InputError: the package wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces.workspaces import Section as WorkspaceSection
        from wandb_workspaces.workspaces import Workspace, WorkspaceSettings
    except ImportError as error:
        remedy = "pip install 'megascale[dashboard]'"
        raise InputError("megascale dashboard", f"wandb-workspaces cannot be imported ({error})", remedy) from error
    return Workspace(
        entity=entity,
        project=project,
        name="megascale",
        sections=[
            WorkspaceSection(name=section.title, panels=[_line_plot(panel) for panel in section.panels], is_open=True)
            for section in SECTIONS
        ],
        settings=WorkspaceSettings(x_axis="tokens"),
    )


def workspace_json(workspace: Workspace) -> str:
    """The JSON text that saving the workspace sends, indented."""
    # The package has no public export; its version is pinned by the extra.
    return workspace._to_model().model_dump_json(by_alias=True, indent=2)


def _line_plot(panel: Panel) -> Any:
    from wandb_workspaces.reports.v2 import LinePlot

    if any("{" in pattern for pattern in panel.metrics):
        return LinePlot(title=panel.title, x=panel.x, metric_regex="|".join(name_regex(p) for p in panel.metrics))
    return LinePlot(title=panel.title, x=panel.x, y=list(panel.metrics))
