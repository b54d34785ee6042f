"""Rows of tokens to the ranks that hold their experts, and back (arXiv 2006.16668, section 3.2).

Experts are spread over the ranks of ep. With etp = tp each expert's width is spread over the tensor-parallel ranks besides. Every rank
routes its own share of the tokens; rows then travel over ep, to the rank with the same tensor-parallel place, and only there all
tensor-parallel ranks gather them, compute their part of the width for all of them, and reduce-scatter the sums; the way back is the
same. A rank with M rows so sends M (ep-1)/ep + M (tp-1), each way. To gather tokens first, M / k of them, and let every tensor-parallel
rank dispatch all would send M tp (ep-1)/ep + M (tp-1)/k: less where ep < k only, and tp times as much over ep, whose ranks are farther
apart than the neighbours of tp.

How many rows go where is data: the ranks exchange counts, and the host must know them, unless a capacity over each rank's own tokens says
how many copies of them any expert may take (`most`): then that many travel, padded with zeros, and no counts (`megascale.parallel.slots`).

While rows travel over ep the caller may compute (`dispatch`, `receive`), and so may the backward pass.

N rows here, d width, E experts, e = E / ep of them here, M rows for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from math import ceil

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.kernels.dispatch import take_rows
from megascale.parallel.charge import charged_to
from megascale.parallel.collectives import exchange_rows, gather_rows, gather_uneven, scatter_uneven
from megascale.parallel.slots import Slots
from megascale.parallel.transfer import Transfer, finish, start

# What a dispatch has to know about others -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """How many rows go where in one dispatch."""

    sent: list[int]
    """to each rank of ep"""
    received: list[list[int]]
    """by each rank of etp, this one included, from each rank of its ep"""
    by_expert: Tensor
    """[etp, ep, e]: rows that etp's ranks received, by the rank of ep they came from, and by expert here; with a further column, of rows
    that are for no expert, where such rows travel too"""


def to_host(counts: Tensor) -> list[list[int]]:
    """Counts as numbers: the only host synchronisation of a dispatch."""
    found: list[list[int]] = counts.tolist()
    return found


Ask = Callable[[], Numbers]


@dataclass
class _Memory:
    """Answers `Ask`s for a while: the first time it asks and notes the answers, `again` it gives the same ones in the same order."""

    notes: list[Numbers]
    again: bool
    next: int = 0
    token: Token | None = field(default=None, repr=False)

    def answer(self, ask: Ask) -> Numbers:
        if not self.again:
            self.notes.append(ask())
        self.next += 1
        return self.notes[self.next - 1]

    def __enter__(self) -> None:
        self.next, self.token = 0, _memory.set(self)

    def __exit__(self, *_: object) -> None:
        assert self.token is not None
        _memory.reset(self.token)


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


def _remembered(ask: Ask) -> Numbers:
    memory = _memory.get()
    return ask() if memory is None else memory.answer(ask)


def remember_numbers() -> tuple[_Memory, _Memory]:
    """A `context_fn` for torch's checkpoint: what a dispatch learned from other ranks in the forward pass, its recomputation knows. Routing
    is the same again, so counts need neither travel nor go to the host a second time.
    """
    notes: list[Numbers] = []
    return _Memory(notes, False), _Memory(notes, True)


# The exchange ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parcel:
    """Rows on their way to their experts."""

    rows: Tensor
    transfer: Transfer | None
    """none: they stay on this rank of ep"""
    numbers: Numbers
    room: int
    """rows before they were padded, or those without an expert left out"""
    slots: Slots | None
    """how they were padded, if so"""
    fused: bool | None
    """whether kernels move them"""


@dataclass(frozen=True)
class Way:
    """How the rows of one dispatch travelled, for the way back."""

    numbers: Numbers
    order: Tensor
    """of the received rows, sorted by expert"""
    place: Tensor
    """the inverse of `order`"""
    room: int
    slots: Slots | None
    fused: bool | None


class ExpertExchange:
    """The exchange points dispatch, receive and combine. The experts are spread over the ranks of `ep` in order.

    Where there are several ranks of ep, an exchange of counts and a host synchronisation say how many rows each gets, if it is not known
    (`most`). Where there is one, and rows are only shared with the other ranks of `etp`, all of them go, also those that a capacity has
    dropped: then their number is known.

    Args:
        ep, etp: process groups; none where there is one rank.
        capacity_factor: of the experts; only for dry runs, which have no counts.
    """

    def __init__(self, ep: dist.ProcessGroup | None, etp: dist.ProcessGroup | None = None, capacity_factor: float | None = None):
        self.ep, self.etp, self.capacity_factor = ep, etp, capacity_factor

    @torch.compiler.disable
    def dispatch(self, copies: Tensor, counts: Tensor, most: int | None, fused: bool | None = None) -> Parcel:
        """Rows [N, d] sorted by expert, and counts [E] of them, at most `most` each, start to travel. Rows behind the last expert's are for
        none.
        """
        room, slots = copies.shape[0], None
        if self.ep is not None and most is not None:
            slots = Slots(counts, room, most, fused)
            copies, numbers = slots.fill(copies), self._numbers_of_slots(counts, most)
        else:
            numbers = _remembered(lambda: self._numbers(counts, room))
        if self.ep is None:
            return Parcel(copies, None, numbers, room, slots, fused)
        transfer, leave = Transfer(self.ep, numbers.sent, numbers.received[_rank(self.etp)]), sum(numbers.sent)
        rows = start(copies if leave == copies.shape[0] else copies[:leave], transfer)
        return Parcel(rows, transfer, numbers, room, slots, fused)

    @torch.compiler.disable
    def receive(self, parcel: Parcel) -> tuple[Tensor, Tensor, Way]:
        """All ranks' rows [M, d] for the experts here, sorted by expert, counts [e], and what `combine` needs."""
        numbers, rows = parcel.numbers, parcel.rows
        if parcel.transfer is not None:
            rows = finish(rows, parcel.transfer)
        if self.etp is not None:
            rows = gather_uneven(rows, [sum(some) for some in numbers.received], self.etp.rank(), self.etp.group_name)
        # rows come sorted by rank, then expert
        by_rank = numbers.by_expert.flatten(0, 1)
        expert = torch.arange(by_rank.shape[1], device=by_rank.device).repeat(by_rank.shape[0])
        order = torch.repeat_interleave(expert, by_rank.flatten(), output_size=rows.shape[0]).argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        counts = by_rank.sum(0)[:-1] if self.ep is None else by_rank.sum(0)
        way = Way(numbers, order, place, parcel.room, parcel.slots, parcel.fused)
        return take_rows(rows, order, place[:, None], fused=parcel.fused), counts, way

    @torch.compiler.disable
    def combine(self, outputs: Tensor, way: Way) -> Tensor:
        """The experts' outputs [M, d] -> [N, d] in the order of `dispatch`'s rows; zeros for rows that had no expert, if they stayed."""
        back, numbers = take_rows(outputs, way.place, way.order[:, None], fused=way.fused), way.numbers
        if self.etp is not None:
            back = scatter_uneven(back, [sum(some) for some in numbers.received], self.etp.rank(), self.etp.group_name)
        if self.ep is None:
            return back
        back = exchange_rows(back, numbers.received[_rank(self.etp)], numbers.sent, self.ep.group_name)
        if way.slots is not None:
            return way.slots.empty(back)
        stayed = way.room - back.shape[0]
        return torch.cat([back, back.new_zeros(stayed, back.shape[1])]) if stayed else back

    def _numbers(self, counts: Tensor, rows: int) -> Numbers:
        ranks, tensor_ranks = _size(self.ep), _size(self.etp)
        parts = counts.view(ranks, -1)
        received = parts
        if self.ep is not None:
            received = torch.empty_like(parts)
            dist.all_to_all_single(received, parts, group=self.ep)
        everyone = received[None]
        if self.etp is not None:
            with charged_to("etp"):
                everyone = gather_rows(everyone, tensor_ranks, self.etp.group_name)
        if self.ep is None:  # every tensor-parallel rank has as many tokens as the others
            nobodys = rows - everyone.sum(-1, keepdim=True)
            return Numbers([rows], [[rows]] * tensor_ranks, torch.cat([everyone, nobodys], -1))
        if counts.is_meta:
            sent = self._even(rows)
            return Numbers(sent, [[sent[self.ep.rank()]] * ranks] * tensor_ranks, everyone)
        sent, *all_received = to_host(torch.cat([parts.sum(-1)[None], everyone.sum(-1)]))
        return Numbers(sent, all_received, everyone)

    def _numbers_of_slots(self, counts: Tensor, most: int) -> Numbers:
        ranks, tensor_ranks = _size(self.ep), _size(self.etp)
        each = counts.numel() // ranks * most
        by_expert = torch.full_like(counts, most).view(ranks, -1).expand(tensor_ranks, -1, -1)
        return Numbers([each] * ranks, [[each] * ranks] * tensor_ranks, by_expert)

    def _even(self, rows: int) -> list[int]:
        """Rows to each rank of ep where counts have no values (dry runs): evenly loaded experts."""
        if self.capacity_factor is not None:
            rows = min(rows, ceil(rows * self.capacity_factor))
        ranks = _size(self.ep)
        return [rows * (i + 1) // ranks - rows * i // ranks for i in range(ranks)]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()
