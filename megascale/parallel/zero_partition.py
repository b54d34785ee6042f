"""What lies where in ZeRO's flat partitions, for stages 1 and 2 (cut across parameters) and 3 (each parameter cut by itself).

Written against DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """A stretch of a parameter that lies in this rank's partition."""

    name: str
    """global name of the parameter"""
    start: int
    """first element, counted in the flattened parameter"""
    place: int
    """where it starts in the partition"""
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """Its view of a tensor that is laid out like the partition."""
        return flat.narrow(0, self.place, self.size)


@dataclass(frozen=True)
class Partition:
    """This rank's part of one of the optimizer's parameter groups."""

    master: Tensor
    """fp32 weights, flat, with DeepSpeed's padding; the optimizer's state is keyed by it"""
    names: tuple[str, ...]
    """of all parameters of the group, those that lie wholly on other ranks included"""
    segments: tuple[Segment, ...]


class CutAcross:
    """ZeRO 1 and 2: the parameters of a group lie one behind the other, cut into equal parts."""

    def __init__(self, engine: Any, names: Mapping[int, str]):
        self.optimizer = engine.optimizer
        # It stages gradients in the dtype of the first parameter; ours are fp32 throughout.
        self.optimizer.dtype = torch.float32
        self.optimizer.use_separate_grad_accum = self.optimizer.use_grad_accum_attribute = False
        self.optimizer._coalesce_grad_reduction = True  # its hooks reduce nothing: gradients are given to it
        self.groups = {id(p): i for i, group in enumerate(self.optimizer.bit16_groups) for p in group}
        self.partitions = [self._partition(i, names) for i in range(len(self.optimizer.bit16_groups))]

    def _partition(self, i: int, names: Mapping[int, str]) -> Partition:
        optimizer = self.optimizer
        size = int(optimizer.partition_size[i])
        first = size * dist.get_rank(optimizer.real_dp_process_group[i])
        segments = []
        parameters = optimizer.round_robin_bit16_groups[i]
        for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[i], strict=True):
            start, stop = max(first, offset), min(first + size, offset + parameter.numel())
            if start < stop:
                segments.append(Segment(names[id(parameter)], start - offset, start - first, stop - start))
        return Partition(
            optimizer.single_partition_of_fp32_groups[i].detach(), tuple(names[id(p)] for p in parameters), tuple(segments)
        )

    def master(self, i: int) -> Tensor:
        """The tensor that the optimizer knows: the key of its state."""
        return self.optimizer.single_partition_of_fp32_groups[i]

    def zero_gradient(self, parameter: nn.Parameter) -> None:
        """Give a parameter without a gradient one of zeros."""
        parameter.grad = torch.zeros(parameter.shape, device=parameter.device)

    def give(self, parameter: nn.Parameter) -> None:
        """Reduce this parameter's gradient, as soon as a bucket is full."""
        self.optimizer.setup_buckets()
        self.optimizer.set_gradient_accumulation_boundary(True)
        self.optimizer.reduce_independent_p_g_buckets_and_remove_grads(parameter, self.groups[id(parameter)])

    def finish(self) -> None:
        """Reduce the last bucket: all gradients were given."""
        self.optimizer.overlapping_partition_gradients_reduce_epilogue()

    def gradients(self) -> list[Tensor]:
        """The reduced gradients of the partitions, flat; the next step uses these very tensors."""
        flats = []
        for i, pieces in self.optimizer.averaged_gradients.items():
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            self.optimizer.averaged_gradients[i] = SimpleNamespace(flat_partition=flat)
            flats.append(flat)
        return flats

    def forget(self) -> None:
        """Drop the reduced gradients."""
        for i in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[i] = self.optimizer.all_grad_tensors[i] = None

    def begin(self) -> None:
        """Nothing to do before a step."""

    def publish(self) -> None:
        """Bring changed masters into the parameters of all ranks."""
        self.optimizer.update_lp_params()

    def set_frozen(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Change a parameter that the optimizer does not know."""
        parameter.copy_(weight)


class CutEach:
    """ZeRO 3: each parameter is cut into equal parts, which lie one behind the other; the whole exists only while it is used."""

    def __init__(self, engine: Any, names: Mapping[int, str], tied: bool):
        self.optimizer = engine.optimizer
        self.optimizer._coalesce_grad_reduction = True  # its hooks reduce nothing: gradients are given to it
        self.offload = self.optimizer.parameter_offload
        # DeepSpeed's own norm costs a host synchronisation a group, and nobody reads it.
        self.optimizer._get_norm_groups = lambda: [torch.zeros(())]
        # Parameters are also read outside the forward of their module (the head by the loss, AltUp's by its layer, tied ones by both):
        # with this mark reading one gathers it. A model that never runs as a whole would not be marked by DeepSpeed.
        for number, module in enumerate(engine.module.modules()):
            module._parameters._in_forward = True
            module.ds_id = number  # DeepSpeed's counts on from earlier engines of the process, and ranks compare them
        self.prefetch = not tied  # a tied weight read by the head may be on its way for the embedding, and reading does not wait
        self.partitions = [self._partition(i, names) for i in range(len(self.optimizer.fp16_groups))]

    def _partition(self, i: int, names: Mapping[int, str]) -> Partition:
        group, place, segments = self.optimizer.fp16_groups[i], 0, []
        for parameter in group:
            part = parameter.partition_numel()
            start = part * dist.get_rank(parameter.ds_process_group)
            size = min(part, parameter.ds_numel - start)
            if size > 0:
                segments.append(Segment(names[id(parameter)], start, place, size))
            place += part
        return Partition(self.master(i).detach(), tuple(names[id(p)] for p in group), tuple(segments))

    def master(self, i: int) -> Tensor:
        """The tensor that the optimizer knows: the key of its state."""
        return self.optimizer.fp32_partitioned_groups_flat[i]

    def zero_gradient(self, parameter: Any) -> None:
        """Give a parameter without a gradient one of zeros; the parameter itself may be cut now, its gradient is whole."""
        held = parameter.data
        parameter.data = held.new_zeros(1).expand(parameter.ds_shape) if parameter.ds_shape else held.new_zeros(())
        parameter.grad = torch.zeros(parameter.ds_shape, device=held.device)
        parameter.data = held

    def give(self, parameter: nn.Parameter) -> None:
        """Reduce this parameter's gradient, as soon as a bucket is full."""
        self.optimizer.reduce_independent_p_g_buckets_and_remove_grads(parameter)

    def finish(self) -> None:
        """Reduce the last bucket: all gradients were given."""
        self.optimizer.independent_gradient_partition_epilogue()

    def gradients(self) -> list[Tensor]:
        """The reduced gradients of the partitions, flat; the next step uses these very tensors.

        ZeRO 3 knows the mean only: its division is undone, exactly where the number of ranks is a power of two.
        """
        flats, place = [], 0
        for i, partition in enumerate(self.partitions):
            flat = self.optimizer.grad_partitions_flat_buffer.narrow(0, place, partition.master.numel())
            flat.mul_(self.optimizer.sub_group_partition_counts[i])
            self.optimizer.averaged_gradients[i] = [flat]
            flats.append(flat)
            place += flat.numel()
        return flats

    def forget(self) -> None:
        """Drop the reduced gradients."""
        self.optimizer.averaged_gradients = {}

    def begin(self) -> None:
        """The order in which modules ran in the last step tells which parameters to gather ahead in this one."""
        if self.prefetch:
            self.offload.get_param_coordinator().reset_step()

    def publish(self) -> None:
        """Bring changed masters into the parameters of all ranks."""
        self.optimizer._partition_all_parameters()
        for i in range(len(self.partitions)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)

    def set_frozen(self, parameter: Any, weight: Tensor) -> None:
        """Change a parameter that the optimizer does not know."""
        parameter.partition()
        start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
        mine = weight.reshape(-1)[start : start + parameter.partition_numel()]
        parameter.ds_tensor[: mine.numel()].copy_(mine)
        if parameter.ds_persist:
            parameter.all_gather()
