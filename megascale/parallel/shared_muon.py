"""Muon beside ZeRO: whole matrices, each with its momentum and its orthogonalisation on one of the ranks that hold it.

What ZeRO 1 does by flat pieces (arXiv 1910.02054, section 5.1) is done here by matrices, because Newton-Schulz needs them whole. The
work is shared too: every rank orthogonalises its own matrices only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.tensors import Tensors
from megascale.config.schema import Optimizer as OptimizerConfig
from megascale.parallel.charge import charged_to
from megascale.parallel.engine import Share
from megascale.parallel.mesh import Mesh, Ranks
from megascale.parallel.plain import PlainEngine
from megascale.parallel.zero import ZeroEngine

Matrix = tuple[str, int]
"""Name of a parameter, and which of its matrices: experts have several, others number 0."""


class SharedMuon(PlainEngine):
    """The plain engine for Muon's matrices, of which each rank updates some and receives the others."""

    def __init__(self, share: Share, config: OptimizerConfig, mesh: Mesh):
        super().__init__(share, config, mesh)
        self.owners = self._share_out()
        mine = {id(self.leaves[name][i]) for (name, i), owner in self.owners.items() if owner == mesh.world.rank}
        for torch_group, _ in self.torch_groups:
            torch_group["params"] = [leaf for leaf in torch_group["params"] if id(leaf) in mine]
        self._forget_others(mine)

    def _share_out(self) -> dict[Matrix, int]:
        """The owner of every matrix: the next goes to the rank with the least work so far. All ranks find the same."""
        owners: dict[Matrix, int] = {}
        work: dict[Ranks, dict[int, float]] = {}
        for name, leaves in self.leaves.items():
            ranks = self.placements[name].sharded_over
            loads = work.setdefault(ranks, dict.fromkeys(ranks, 0.0))
            for i, leaf in enumerate(leaves):
                owners[name, i] = owner = min(ranks, key=lambda rank: (loads[rank], rank))
                loads[owner] += leaf.numel() * min(leaf.shape)
        return owners

    def _forget_others(self, mine: Collection[int]) -> None:
        """Give back the masters of matrices that other ranks update (fp32 ones are the model's own memory)."""
        for name, leaves in self.leaves.items():
            if self.parameters[name].dtype != torch.float32:
                for leaf in leaves:
                    leaf.data = leaf.data.clone() if id(leaf) in mine else leaf.data.new_empty(0)
        self.masters = {}

    def _owned(self) -> Iterator[tuple[str, int, nn.Parameter]]:
        for (name, i), owner in self.owners.items():
            if owner == self.mesh.world.rank:
                yield name, i, self.leaves[name][i]

    def _matrix(self, name: str, i: int) -> Tensor:
        """The memory of a matrix in the model's parameter."""
        data = self.parameters[name].data
        return data if data.ndim == 2 else data[i]

    @torch.no_grad()
    def step(self, lr_scale: float, new_scale: float = 1.0) -> None:
        """See `Engine`."""
        self._update(lr_scale, new_scale)
        for name, i, leaf in self._owned():
            self._matrix(name, i).copy_(leaf)  # nothing to do in fp32, where they are the same memory
        self._spread()
        self.skip()

    def _spread(self) -> None:
        """Every owner sends its matrices to the others."""
        batches: dict[tuple[Ranks, int, torch.dtype], list[Tensor]] = {}
        for (name, i), owner in self.owners.items():
            ranks = self.placements[name].sharded_over
            if len(ranks) > 1:
                batches.setdefault((ranks, owner, self.parameters[name].dtype), []).append(self._matrix(name, i))
        for ranks, owner, dtype in sorted(batches, key=str):  # one order on all ranks
            matrices = batches[ranks, owner, dtype]
            flat = torch.cat([matrix.reshape(-1) for matrix in matrices])
            with charged_to("dp"):
                dist.broadcast(flat, owner, group=self.mesh.group(ranks))
            parts = flat.split([matrix.numel() for matrix in matrices])
            torch._foreach_copy_(matrices, [part.view_as(m) for part, m in zip(parts, matrices, strict=True)])

    def rectangles(self) -> Iterable[Rectangle]:
        """See `Engine`. Owners write, of the first of those who share the same matrices."""
        (optimizer,) = self.optimizers
        for name, i, leaf in self._owned():
            place = self.placements[name]
            if place.holders[0] not in place.sharded_over:
                continue
            states: dict[str, Any] = optimizer.state.get(leaf, {})
            for kind, tensor in {"model": leaf.detach(), **{f"muon.{kind}": state for kind, state in states.items()}}.items():
                if len(place.global_shape) == 2:
                    yield Rectangle(f"{kind}/{name}", place.global_shape, place.offsets, tensor)
                else:
                    yield Rectangle(f"{kind}/{name}", place.global_shape, (place.offsets[0] + i, 0, 0), tensor[None])

    @torch.no_grad()
    def load(self, reader: Tensors, new: Collection[str] = (), moments: bool = True) -> None:
        """See `Engine`."""
        (optimizer,) = self.optimizers
        kinds = {key.split("/", 1)[0] for key in reader.names() if moments and key.startswith("muon.")}
        owned: dict[str, list[tuple[int, nn.Parameter]]] = {}
        for name, i, leaf in self._owned():
            owned.setdefault(name, []).append((i, leaf))
        for name, parameter in self.parameters.items():
            if name in new:
                continue
            offsets, sizes = self.placements[name].offsets, tuple(parameter.shape)
            for kind in ("model", *kinds) if name in owned else ("model",):
                read = reader.read(f"{kind}/{name}", offsets, sizes)
                for i, leaf in owned.get(name, ()):
                    matrix = read if read.ndim == 2 else read[i]
                    if kind == "model":
                        leaf.copy_(matrix)
                    else:
                        optimizer.state[leaf][kind.split(".", 1)[1]] = matrix.clone().to(leaf.device)
                if kind == "model":
                    parameter.copy_(read)


class ZeroMuonEngine:
    """AdamW's parameters under DeepSpeed's ZeRO, Muon's matrices beside it; one norm, one clipping."""

    def __init__(
        self,
        model: nn.Module,
        share: Share,
        config: OptimizerConfig,
        mesh: Mesh,
        stage: int,
        passthrough: Mapping[str, Any],
        overlap: bool,
    ):
        """Arguments as those of `ZeroEngine`; stage 1 or 2."""
        assert stage < 3, "ZeRO 3 cuts matrices"
        self.groups, self.parameters, self.placements = share.groups, share.parameters, share.placements
        matrices, rest = _by_optimizer(share)
        self.zero = ZeroEngine(model, rest, config, mesh, stage, passthrough, overlap)
        self.muon = SharedMuon(matrices, config, mesh)

    def begin(self) -> None:
        """See `Engine`."""
        self.muon.begin()
        self.zero.begin()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        self.zero.expect(last)
        self.muon.backward(loss, last)

    def gradient_norm(self) -> float:
        """See `Engine`."""
        self.muon.norm = self.zero.norm = norm = (self.muon.reduce() + self.zero.reduce()).sqrt().float()
        return float(norm)

    def step(self, lr_scale: float, new_scale: float = 1.0) -> None:
        """See `Engine`."""
        self.muon.step(lr_scale, new_scale)
        self.zero.step(lr_scale, new_scale)

    def skip(self) -> None:
        """See `Engine`."""
        self.muon.skip()
        self.zero.skip()

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        assert not weights.keys() & self.muon.trained.keys(), "Muon's matrices are whole on one rank"
        self.zero.adopt(weights)

    def rectangles(self) -> Iterable[Rectangle]:
        """See `Engine`."""
        return chain(self.zero.rectangles(), self.muon.rectangles())

    def load(self, reader: Tensors, new: Collection[str] = (), moments: bool = True) -> None:
        """See `Engine`."""
        self.zero.load(reader, new, moments)
        self.muon.load(reader, new, moments)


def _by_optimizer(share: Share) -> tuple[Share, Share]:
    """What Muon updates, and all the rest."""
    by_muon = [group for group in share.groups if group.optimizer == "muon"]
    names = {name for group in by_muon for name in group.parameters}
    rest = [group for group in share.groups if group.optimizer != "muon"]
    matrices = {name: parameter for name, parameter in share.parameters.items() if name in names}
    others = {name: parameter for name, parameter in share.parameters.items() if name not in names}
    return replace(share, groups=by_muon, parameters=matrices), replace(share, groups=rest, parameters=others)
