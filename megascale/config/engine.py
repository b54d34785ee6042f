"""Settings that may not be passed through to DeepSpeed: megascale sets them itself, or has not tested them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megascale.config.layout import zero_stage_of
from megascale.config.origin import Problem
from megascale.config.schema import Config

OURS = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.sequences and batch.micro_batches",
    "gradient_accumulation_steps": "batch.micro_batches",
    "managed_gradient_accumulation": "batch.micro_batches",
    "elasticity": "batch.sequences",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "scheduler": "schedule",
    "gradient_clipping": "optimizer.clip",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
    "expert_parallel": "parallel.ep",
    "use_data_before_expert_parallelism": "parallel.ep",
    "checkpoint": "checkpoint",
    "steps_per_print": "observe.console_every",
    "wandb": "observe.wandb",
    "tensorboard": "observe",
    "csv_monitor": "observe",
    "comet": "observe",
}
"""Keys of DeepSpeed's config that follow from settings of megascale, and those settings."""

SUMS = ("gradient_allreduce_op", "prescale_gradients", "gradient_predivide_factor")
"""Keys that would change the sum of the gradients over ranks, which the losses are scaled for."""

FIXED = (
    "contiguous_gradients",
    "reduce_scatter",
    "parameter_alignment",
    "memory_efficient_linear",
    "compute_grad_norm",
)
"""Keys of zero_optimization whose value the DeepSpeed engine here depends on."""

UNTESTED = ("offload_", "cpu_offload", "round_robin_gradients", "zero_hpz_partition_size", "mics_")
"""Beginnings of the keys of zero_optimization that this version refuses."""


def engine_problems(config: Config, world: int | None) -> Iterator[Problem]:
    """Keys of engine.deepspeed that conflict with megascale's, and any at all where DeepSpeed is not used.

    Args:
        config: the tree.
        world: number of ranks; none = not known, so neither is an underived ZeRO stage.
    """
    given, path = config.engine.deepspeed, ("engine", "deepspeed")
    for key in given:
        if key in OURS:
            yield Problem((*path, key), f"megascale sets this itself, from {OURS[key]}; remove it and set {OURS[key]}")
        elif key in SUMS:
            yield Problem((*path, key), "gradients are summed over ranks, because losses are scaled for a sum; remove it")
    if "zero_optimization" in given:
        yield from _zero_problems(given["zero_optimization"])
    if given and config.parallel.zero_stage is None and world is not None and zero_stage_of(config, world) == 0:
        reason = "has no effect: one data-parallel rank runs without DeepSpeed; remove it, or set parallel.zero_stage"
        yield Problem(path, reason)


def _zero_problems(settings: Any) -> Iterator[Problem]:
    path = ("engine", "deepspeed", "zero_optimization")
    if not isinstance(settings, dict):
        yield Problem(path, "expected a section, for example {overlap_comm: true}")
        return
    for key in settings:
        if key == "stage":
            yield Problem(
                (*path, key), "megascale sets this itself, from parallel.zero_stage; remove it and set parallel.zero_stage"
            )
        elif key in FIXED:
            yield Problem((*path, key), "megascale's engine depends on its own value; remove it")
        elif key.startswith(UNTESTED):
            yield Problem((*path, key), "not tested with megascale yet, so refused; remove it")
