"""The plain torch engine: every rank keeps the whole state of the parameters it holds. The reference for every other engine."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.tensors import Tensors
from megascale.config.schema import Muon
from megascale.config.schema import Optimizer as OptimizerConfig
from megascale.parallel.charge import charged_to
from megascale.parallel.engine import OptimizerGroup, Share
from megascale.parallel.mesh import Mesh, Ranks

BUCKET = 2**23
"""Gradient elements reduced by one collective: 32 MiB, enough for full bandwidth, small enough to start during the backward pass."""


class _Bucket:
    """A stretch of a flat gradient that is reduced once all its parameters have theirs."""

    def __init__(self, flat: Tensor, holders: Ranks, waiting: int):
        self.flat, self.holders, self.size, self.waiting = flat, holders, waiting, waiting
        self.work: dist.Work | None = None


def allow_fp32_gradient(name: str, parameter: nn.Parameter) -> None:
    """Let a bf16 parameter have an fp32 gradient. To one that is there bf16 is added in one pass, without a copy in fp32.

    A weight that is used twice, a tied one, is different: autograd would sum both contributions in bf16 before it adds them.
    """
    if parameter.dtype != torch.float32:
        parameter.grad_dtype = torch.float32 if name == "embedding.weight" else None


def sum_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """For weights that get several contributions in one backward pass: each is made fp32 before they are summed."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32


class PlainEngine:
    """fp32 gradients in flat buffers, fp32 masters for bf16 parameters, AdamW and Muon of torch.

    Parameters with the same holders share a buffer, ordered last parameter first, so that its buckets fill up, and are reduced, while the
    backward pass runs. Muon sees whole matrices: an [E, o, i] expert tensor is E of them.
    """

    def __init__(self, share: Share, config: OptimizerConfig, mesh: Mesh):
        self.mesh, self.clip = mesh, config.clip
        self.groups, self.parameters, self.placements = share.groups, share.parameters, share.placements
        self.trained = {name: p for group in self.groups for name, p in group.parameters.items()}
        # while a pipeline runs, ranks of different stages finish different gradients first: reductions would start in different orders
        self.overlap = mesh.size("pp") == 1
        self.last_micro_batch = False
        self.flats: dict[Ranks, Tensor] = {}
        self.buckets: list[_Bucket] = []
        for holders in sorted({self.placements[name].holders for name in self.trained}):
            self._flatten_gradients(holders)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(share.weights[name]) for name, p in self.parameters.items()
        }
        self.leaves: dict[str, list[nn.Parameter]] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.torch_groups: list[tuple[dict, OptimizerGroup]] = []
        for kind in ("adamw", "muon"):
            self._add_optimizer(kind, [group for group in self.groups if group.optimizer == kind and group.parameters], config)

    def _flatten_gradients(self, holders: Ranks) -> None:
        backwards = {name: p for name, p in reversed(self.trained.items()) if self.placements[name].holders == holders}
        flat = torch.zeros(sum(p.numel() for p in backwards.values()), device=next(iter(backwards.values())).device)
        start = first = count = 0
        for i, (name, p) in enumerate(backwards.items()):
            allow_fp32_gradient(name, p)
            p.grad = flat[start : start + p.numel()].view_as(p)
            start, count = start + p.numel(), count + 1
            p.register_post_accumulate_grad_hook(partial(_tell, weakref.ref(self), len(self.buckets)))
            if start - first >= BUCKET or i == len(backwards) - 1:
                self.buckets.append(_Bucket(flat[first:start], holders, count))
                first, count = start, 0
        self.flats[holders] = flat

    def gradient_final(self, index: int) -> None:
        """A gradient of this bucket is final in this backward pass."""
        if not self.last_micro_batch or not self.overlap:
            return
        bucket = self.buckets[index]
        bucket.waiting -= 1
        if bucket.waiting == 0:
            self._reduce(bucket, hidden=any(other.waiting for other in self.buckets))

    def _reduce(self, bucket: _Bucket, hidden: bool = False) -> None:
        if len(bucket.holders) > 1:
            with charged_to("dp", hidden):
                bucket.work = dist.all_reduce(bucket.flat, group=self.mesh.group(bucket.holders), async_op=True)

    def _add_optimizer(self, kind: str, groups: Sequence[OptimizerGroup], config: OptimizerConfig) -> None:
        if not groups:
            return
        options = []
        for group in groups:
            for name in group.parameters:
                master = self.masters[name]
                whole = kind == "adamw" or master.ndim == 2
                self.leaves[name] = [master] if whole else [nn.Parameter(matrix) for matrix in master.detach().unbind()]
                for leaf, grad in zip(self.leaves[name], self._leaf_views(name, self.parameters[name].grad), strict=True):
                    leaf.grad = grad
            leaves = [leaf for name in group.parameters for leaf in self.leaves[name]]
            options.append({"params": leaves, "lr": group.lr, "weight_decay": group.weight_decay})
        if kind == "adamw":
            fused = not self.mesh.world.device.is_meta  # a dry run never steps, but torch would refuse already here
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(options, betas=config.betas, eps=config.eps, fused=fused)
        else:
            muon = config.muon or Muon()
            optimizer = torch.optim.Muon(options, momentum=muon.momentum, ns_steps=muon.iterations)
        self.optimizers.append(optimizer)
        self.torch_groups += zip(optimizer.param_groups, groups, strict=True)

    def _leaf_views(self, name: str, x: Tensor | None) -> list[Tensor]:
        assert x is not None
        return [x] if len(self.leaves[name]) == 1 and self.leaves[name][0].shape == x.shape else list(x.unbind())

    def begin(self) -> None:
        """See `Engine`."""
        self.last_micro_batch = False

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        self.last_micro_batch = last
        loss.backward()

    def gradient_norm(self) -> float:
        """See `Engine`. One host synchronisation: the guard must know the norm before the update."""
        self.norm = self.reduce().sqrt().float()
        return float(self.norm)

    def reduce(self) -> Tensor:
        """Finish the reduction; the square of the global norm, in fp64, on the device."""
        for bucket in self.buckets:
            if bucket.work is None:  # not reduced yet: a pipeline ran, or a parameter in it had no gradient on this rank
                self._reduce(bucket)
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
            bucket.work, bucket.waiting = None, bucket.size
        return self._square()

    def _square(self) -> Tensor:
        """Of the norm of the global gradient: each piece counts once, whoever holds it."""
        world = self.mesh.world
        if len(self.flats) == 1 and len(next(iter(self.flats))) == world.size:
            return norm_of(next(iter(self.flats.values()))).square()
        square = torch.zeros((), dtype=torch.float64, device=world.device.torch)  # also of a rank that trains nothing
        for holders, flat in self.flats.items():
            square += norm_of(flat).square() / len(holders)
        return world.sum(square)

    @torch.no_grad()
    def step(self, lr_scale: float, new_scale: float = 1.0) -> None:
        """See `Engine`."""
        self._update(lr_scale, new_scale)
        bf16 = [name for name, p in self.trained.items() if p is not self.masters[name]]
        if bf16:
            torch._foreach_copy_([self.parameters[name].data for name in bf16], [self.masters[name].data for name in bf16])
        self._forget_gradients()

    def _update(self, lr_scale: float, new_scale: float) -> None:
        """Clip, and update the masters."""
        if self.clip is not None and self.flats:  # a rank may train nothing
            torch._foreach_mul_(list(self.flats.values()), (self.clip / self.norm).clamp(max=1.0))
        for torch_group, group in self.torch_groups:
            torch_group["lr"] = group.lr * lr_scale * (new_scale if group.new else 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def skip(self) -> None:
        """See `Engine`."""
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        if self.flats:
            torch._foreach_zero_(list(self.flats.values()))

    @torch.no_grad()
    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for name, weight in weights.items():
            self.masters[name].copy_(weight)
            self.parameters[name].copy_(weight)

    def _states(self, name: str) -> list[tuple[str, list[Tensor]]]:
        """(kind of state, one tensor a leaf) of a parameter's optimizer state; empty for frozen ones and before the first step.

        In order of the kinds, so that the files of a resumed run are those of an uninterrupted one.
        """
        states = []
        for optimizer in self.optimizers:
            by_leaf = [optimizer.state[leaf] for leaf in self.leaves.get(name, ()) if leaf in optimizer.state]
            prefix = type(optimizer).__name__.lower()
            kinds = sorted(by_leaf[0]) if by_leaf else []
            states += [(f"{prefix}.{kind}", [state[kind] for state in by_leaf]) for kind in kinds]
        return states

    def rectangles(self) -> Iterable[Rectangle]:
        """See `Engine`. The holders of a parameter share the writing by turns."""
        for name, master in self.masters.items():
            place = self.placements[name]
            if place.holders[zlib.crc32(name.encode()) % len(place.holders)] != self.mesh.world.rank:
                continue
            yield Rectangle(f"model/{name}", place.global_shape, place.offsets, master.detach())
            for kind, tensors in self._states(name):
                if tensors[0].ndim == 0:
                    if not any(place.offsets):  # one number for the whole parameter: whoever has its first piece writes it
                        yield Rectangle(f"{kind}/{name}", (), (), tensors[0])
                elif len(tensors) == 1:
                    yield Rectangle(f"{kind}/{name}", place.global_shape, place.offsets, tensors[0])
                else:
                    for e, tensor in enumerate(tensors):
                        yield Rectangle(f"{kind}/{name}", place.global_shape, (place.offsets[0] + e, 0, 0), tensor[None])

    @torch.no_grad()
    def load(self, reader: Tensors, new: Collection[str] = (), moments: bool = True) -> None:
        """See `Engine`."""
        names = set(reader.names())
        for name, master in self.masters.items():
            if name in new:
                continue
            master.copy_(reader.read(f"model/{name}", self.placements[name].offsets, tuple(master.shape)))
            self.parameters[name].copy_(master)
        for optimizer in self.optimizers if moments else ():
            prefix = type(optimizer).__name__.lower()
            kinds = {key.split("/", 1)[0] for key in names if key.startswith(f"{prefix}.")}
            for name, leaves in self.leaves.items():
                mine = [leaf for leaf in leaves if any(leaf is p for g in optimizer.param_groups for p in g["params"])]
                for kind in kinds if mine and name not in new else ():
                    saved = self._read_state(reader, f"{kind}/{name}", name)
                    parts = [saved] if len(leaves) == 1 else list(saved.unbind())
                    for leaf, part in zip(leaves, parts, strict=True):
                        optimizer.state[leaf][kind.split(".", 1)[1]] = part.clone().to(leaf.device)

    def _read_state(self, reader: Tensors, key: str, name: str) -> Tensor:
        if not reader.shape(key):
            return reader.read(key)
        return reader.read(key, self.placements[name].offsets, tuple(self.masters[name].shape))


def norm_of(flat: Tensor) -> Tensor:
    """Summed in fp64: in fp32 on a CPU torch's is wrong by 1e-3 for 20 million elements (torch 2.13)."""
    return torch.linalg.vector_norm(flat, dtype=torch.float64)


def _tell(engine: weakref.ref[PlainEngine], index: int, _parameter: Tensor) -> None:
    """A parameter's hook. It must not keep the engine: the garbage collector does not see through a tensor's hooks, and engine, model and
    process groups would stay for ever.
    """
    here = engine()
    if here is not None:
        here.gradient_final(index)
