"""Start a DeepSpeed engine as part of a layout that DeepSpeed does not know: its groups, its settings, and what it must not do.

DeepSpeed 0.19.8: its mixed precision is off (it would cast routers and norms), so are its clipping, loss scaling, overflow checks,
monitors and learning rates; what stays is ZeRO (arXiv 1910.02054): sharding, reduction and gathering.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from megascale.config.errors import InputError
from megascale.parallel.mesh import DATA, Mesh, Ranks
from megascale.parallel.zero_traffic import BUCKET


class _DataGroup:
    """What DeepSpeed asks of an `mpu`: the ranks it may shard over. It learns nothing of tensor and pipeline parallelism."""

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup):
        self.ranks, self.group = ranks, group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_group_ranks(self) -> Ranks:
        return self.ranks

    def get_data_parallel_world_size(self) -> int:
        return len(self.ranks)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def process_group(mesh: Mesh, ranks: Ranks) -> dist.ProcessGroup:
    """The group of these ranks, this one included; the mesh has none for a rank alone."""
    if len(ranks) > 1:
        return mesh.group(ranks)
    if not dist.is_initialized():  # a run of one process
        dist.init_process_group(mesh.world.device.backend, store=dist.HashStore(), rank=0, world_size=1)
    alone = dist.new_group(list(ranks), use_local_synchronization=True)
    assert alone is not None
    return alone


def settings(stage: int, passthrough: Mapping[str, Any], overlap: bool) -> dict[str, Any]:
    """DeepSpeed's config: what the user passes through, and what the adapter depends on. `overlap`: gradients are given to it while a
    backward pass runs, so it reduces them beside (with a second bucket).

    Raises:
        InputError: the user sets something that the adapter depends on.
    """
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear in the whole process
        "compute_grad_norm": stage == 3,  # ours is the one that counts; ZeRO 3 has no such switch
    }
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # the engine object sees no batch
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # ZeRO 3 knows the mean only
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    given = dict(passthrough)
    given_zero = given.pop("zero_optimization", {})
    taken = [*(given.keys() & ours.keys()), *(f"zero_optimization.{key}" for key in given_zero.keys() & zero.keys())]
    if taken:
        raise InputError(f"engine.deepspeed.{min(taken)}", "megascale's engine depends on its own value", "remove it")
    defaults = {"reduce_bucket_size": BUCKET, "overlap_comm": overlap or stage == 3}
    return {**given, **ours, "zero_optimization": {**defaults, **given_zero, **zero}}


def _mark_experts(mesh: Mesh, root: nn.Module, experts: Mapping[Ranks, Sequence[nn.Parameter]]) -> dict[Ranks, str]:
    """Make DeepSpeed shard these parameters over their own ranks; returns the names of their groups.

    DeepSpeed looks for its own MoE layer in the model before it asks for expert groups, hence the empty one.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """Its groups exist."""

    by_name = {ranks: f"ep_size_{i}" for i, ranks in enumerate(experts, 1)}
    for registry in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS):
        registry.clear()
    for ranks, name in by_name.items():
        group = process_group(mesh, ranks)
        # tokens are dispatched by our own modules: the expert-parallel group only has to be there
        groups._EXPERT_PARALLEL_GROUP[name] = groups._EXPERT_DATA_PARALLEL_GROUP[name] = group
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(ranks)
        for parameter in experts[ranks]:
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    if by_name:
        root.add_module("expert_marker", Marker())
    return by_name


def _set_variables(mesh: Mesh) -> None:
    """What DeepSpeed reads from the environment, now and later, right for this rank whatever launcher started it."""
    device = mesh.world.device.torch
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # it means the device
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # has to agree
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = os.environ["LOCAL_RANK"]


def _mixed_flat_groups(optimizer: Any) -> None:
    """In place of ZeRO 3's one buffer for all partitions, which wants one dtype: one buffer for each group."""
    from deepspeed.runtime.zero.utils import defragment

    for group in optimizer.fp16_groups:
        optimizer.fp16_partitioned_groups_flat.append(defragment([p.ds_tensor for p in group]))


def _forget_earlier_engines() -> None:
    """ZeRO 3 numbers modules and parameters over the life of a process and compares the numbers between ranks: start at 0 everywhere."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    partition_parameters.Init.param_id = 0
    parameter_offload.FWD_MODULE_STACK.clear()


@contextmanager
def _mixed_dtypes(stage: int) -> Iterator[None]:
    """Let ZeRO 3 hold bf16 and fp32 parameters beside each other."""
    if stage < 3:
        yield
        return
    from deepspeed.runtime.zero import stage3

    _forget_earlier_engines()
    optimizer = stage3.DeepSpeedZeroOptimizer_Stage3
    with (
        mock.patch.object(stage3, "defragment", lambda tensors: torch.empty(0, device=tensors[0].device)),
        mock.patch.object(optimizer, "_set_fp16_partitioned_groups_flat", _mixed_flat_groups),
    ):
        yield


def start_deepspeed(
    model: nn.Module,
    options: list[dict[str, Any]],
    betas: tuple[float, float],
    eps: float,
    shards: Mapping[Ranks, Sequence[nn.Parameter]],
    mesh: Mesh,
    stage: int,
    passthrough: Mapping[str, Any],
    overlap: bool,
) -> Any:
    """DeepSpeed's engine over AdamW with one parameter group for each of `options`.

    Args:
        options: AdamW's groups, each of one dtype and of parameters with the same `ranks` to shard over (a key of the group).
        shards: the parameters to be sharded over other ranks than the data axes, by those ranks.
        passthrough: the user's DeepSpeed settings.
        overlap: see `settings`.

    Raises:
        InputError: DeepSpeed refuses a setting, or is too old.
    """
    _set_variables(mesh)
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    # It would be compiled now, under a lock that outlives a killed process, and gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch 2.13 warns about, at each call
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    data = mesh.along(*DATA)
    group = process_group(mesh, data)
    root = nn.Module()
    root.add_module("model", model)
    names = _mark_experts(mesh, root, shards)
    for option in options:
        ranks = option.pop("ranks")
        option |= {"moe": ranks in names, "name": names.get(ranks, "data")}
    optimizer = torch.optim.AdamW(options, betas=betas, eps=eps, fused=True)
    config = settings(stage, passthrough, overlap)
    mpu = _DataGroup(data, group)
    try:
        DeepSpeedConfig(dict(config), mpu)
    except ValueError as error:
        raise InputError(
            "engine.deepspeed", f"DeepSpeed refuses it: {error}", "see DeepSpeed's configuration reference"
        ) from error
    with _mixed_dtypes(stage):
        engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False)
    if stage < 3 and getattr(engine.optimizer, "gradient_average", True):
        raise InputError("deepspeed", f"version {deepspeed.__version__} cannot sum gradients", "install deepspeed 0.19.8")
    return engine
