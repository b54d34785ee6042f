"""A ledger of what a rank sends: every collective by axis of the layout, kind and number of ranks. For dry runs and for real ones.

What counts is the bytes that leave one rank under ring algorithms over n ranks (Thakur et al. 2005, "Optimization of collective
communication operations in MPICH"): all-gather (n-1)/n of the result, reduce-scatter (n-1)/n of the input, all-reduce twice (n-1)/n of the
tensor, all-to-all (n-1)/n of the input (even shares), broadcast and reduce (n-1)/n of the tensor on average over the ranks, send all of it.
What is received is counted where it is sent.

Axes: tp, cp, stream, ep, etp, pp as in the layout; stage: counts of all ranks of a pipeline stage (routers); dp: gradients and weights of
the engine, over whatever ranks hold them; world: the norm and the loop's sums. Where the process groups of two axes have the same ranks,
the engine and the loop name theirs (`megascale.parallel.charge`); of the model's own, all-to-all is ep, sums of counts are stage, and the
rest belongs to the first axis that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megascale.parallel.charge import account
from megascale.parallel.mesh import DATA, STAGE, Mesh, Ranks

SEND = "send"
PASSES = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "broadcast": 1,
    "reduce": 1,
    "gather": 1,
    "scatter": 1,
}
"""How often (n-1)/n of the bytes of a collective leave a rank."""


@dataclass(frozen=True)
class Entry:
    """All collectives of one axis, kind and number of ranks."""

    axis: str
    kind: str
    """a key of `PASSES`, or send"""
    ranks: int
    """of the process group"""
    calls: int
    volume: int
    """bytes of the tensors: results of all-gathers, inputs of the others"""
    hidden: int = 0
    """those of them that travel while a backward pass goes on"""

    @property
    def sent(self) -> Fraction:
        """Bytes that leave this rank, exact."""
        return (
            Fraction(self.volume)
            if self.kind == SEND
            else Fraction(PASSES[self.kind] * self.volume * (self.ranks - 1), self.ranks)
        )

    @property
    def exposed(self) -> Fraction:
        """Of the bytes that leave this rank those behind which no backward pass goes on: the step waits for them."""
        return self.sent * Fraction(self.volume - self.hidden, self.volume) if self.volume else Fraction()


@dataclass(frozen=True)
class _Operation:
    """A torch operator: where the tensors that count and the process group stand among its arguments."""

    kind: str
    tensors: int
    group: int
    shares: bool = False
    """the tensors are one rank's share of the result"""
    axis: str | None = None
    """none: the process group tells"""


_C10D = {
    "allreduce_": _Operation("all-reduce", 0, 1),
    "allreduce_coalesced_": _Operation("all-reduce", 0, 1),
    "_allgather_base_": _Operation("all-gather", 0, 2),
    "allgather_": _Operation("all-gather", 0, 2),
    "allgather_coalesced_": _Operation("all-gather", 0, 2),
    "allgather_into_tensor_coalesced_": _Operation("all-gather", 0, 2),
    "_reduce_scatter_base_": _Operation("reduce-scatter", 1, 2),
    "reduce_scatter_": _Operation("reduce-scatter", 1, 2),
    "reduce_scatter_tensor_coalesced_": _Operation("reduce-scatter", 1, 2),
    "alltoall_base_": _Operation("all-to-all", 1, 2),
    "alltoall_": _Operation("all-to-all", 1, 2),
    "broadcast_": _Operation("broadcast", 0, 1),
    "reduce_": _Operation("reduce", 0, 1),
    "gather_": _Operation("gather", 1, 2),
    "scatter_": _Operation("scatter", 0, 2),
    "send": _Operation(SEND, 0, 1),
}
_MODEL = {
    "gather_rows": _Operation("all-gather", 0, 2, shares=True),
    "scatter_sum": _Operation("reduce-scatter", 0, 2),
    "sum_over": _Operation("all-reduce", 0, 1, axis="stage"),
    "sum_parts": _Operation("all-reduce", 0, 1, axis="stream"),
    "swap_rows": _Operation("all-to-all", 0, 1, axis="cp"),
    "exchange_rows": _Operation("all-to-all", 0, 3),
    "gather_uneven": _Operation("all-gather", 0, 3, shares=True, axis="etp"),
    "scatter_uneven": _Operation("reduce-scatter", 0, 3, axis="etp"),
}
"""The operators of `megascale.parallel.collectives`; what they call inside is not seen. Parts that are not even count as if all were like
this rank's, which is right for the sum over the ranks."""


def _overloads() -> dict[Any, _Operation]:
    """The operators by what a dispatch mode is given."""
    from megascale.parallel import collectives  # defines the model's

    found = {getattr(collectives, name)._opoverload: operation for name, operation in _MODEL.items()}
    # torch versions lack some
    return found | {getattr(torch.ops.c10d, n).default: o for n, o in _C10D.items() if hasattr(torch.ops.c10d, n)}


class Ledger(TorchDispatchMode):
    """Records this rank's collectives while it is entered: ``with Ledger(mesh) as ledger: ...; ledger.entries()``.

    A compiled layer runs eagerly meanwhile: torch does not enter compiled code under a dispatch mode.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.operations = _overloads()
        self.axes = _axes(mesh)
        self.groups: dict[str, Ranks] = {}
        self.found: dict[tuple[str, str, int], list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Notes a collective and lets it run."""
        operation = self.operations.get(func)
        if operation is not None:
            ranks = self._ranks(args[operation.group])
            tensors: Iterable[Any] = tree_leaves(args[operation.tensors])
            volume = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
            self.note(operation.kind, ranks, volume * (len(ranks) if operation.shares else 1), operation.axis)
        return func(*args, **(kwargs or {}))

    def note(self, kind: str, ranks: Ranks, volume: int, axis: str | None = None, calls: int = 1) -> None:
        """Add collectives, also such that are only computed: `volume` as in `Entry`, all calls together."""
        charged, hidden = account()
        axis = axis or charged or self._axis(kind, ranks)
        found = self.found.setdefault((axis, kind, len(ranks)), [0, 0, 0])
        found[0] += calls
        found[1] += volume
        found[2] += volume * hidden

    def entries(self) -> list[Entry]:
        """What was noted so far, by axis, kind and number of ranks."""
        return [Entry(*key, *numbers) for key, numbers in sorted(self.found.items())]

    def sent(self) -> dict[str, Fraction]:
        """Bytes that leave this rank, by axis."""
        return {axis: sum((e.sent for e in self.entries() if e.axis == axis), Fraction()) for axis, *_ in sorted(self.found)}

    def _axis(self, kind: str, ranks: Ranks) -> str:
        if kind in (SEND, "all-to-all"):
            return "pp" if kind == SEND else "ep"
        # weights that ZeRO 3 gathers in the middle of a forward pass go over the data ranks; of sums over these, the model's own are counts
        names = [name for name, members in self.axes if members == ranks and not (name == "stage" and kind != "all-reduce")]
        return names[0] if names else "other"

    def _ranks(self, group: Any) -> Ranks:
        """The ranks of a process group, which comes as its name, as itself, or in torch's box."""
        if isinstance(group, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(group)
        name: Any = group if isinstance(group, str) else group.group_name
        if name not in self.groups:
            self.groups[name] = tuple(sorted(dist.get_process_group_ranks(_resolve_process_group(name))))
        return self.groups[name]


def _axes(mesh: Mesh) -> list[tuple[str, Ranks]]:
    """Names of sets of ranks; of equal sets the first counts."""
    single = [(axis, mesh.along(axis)) for axis in ("tp", "cp", "stream")]
    world = tuple(range(mesh.world.size))
    return [*single, ("stage", mesh.along(*STAGE)), ("dp", mesh.along(*DATA)), ("pp", mesh.along("pp")), ("world", world)]
