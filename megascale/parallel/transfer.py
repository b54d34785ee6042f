"""Rows that travel while something else is computed, in the forward and in the backward pass.

The results do not depend on it: what is computed, and in which order sums are formed, stays the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Transfer:
    """One all-to-all of rows that others wait for later, and in the backward pass its way back, likewise."""

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]):
        self.group, self.sent, self.received = group, sent, received
        self.work: dist.Work | None = None
        self.tensors: tuple[Tensor, Tensor] | None = None

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        """What will arrive, not to be read before `wait`."""
        leave, arrive = (self.received, self.sent) if back else (self.sent, self.received)
        rows, arrived = rows.contiguous(), rows.new_empty(sum(arrive), *rows.shape[1:])
        self.work = dist.all_to_all_single(arrived, rows, arrive, leave, group=self.group, async_op=True)
        self.tensors = rows, arrived  # alive while they travel
        return arrived

    def wait(self) -> None:
        """The rows have arrived."""
        assert self.work is not None
        self.work.wait()
        self.work = self.tensors = None


class _Start(torch.autograd.Function):
    """Starts a transfer of rows, and returns them, for `_Finish`; the backward pass ends here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.start(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.wait()
        return grad, None


class _Finish(torch.autograd.Function):
    """Waits for the rows of the others; the backward pass starts here. Between the two autograd runs what was computed between them in the
    forward pass: among what is ready it takes the youngest first.
    """

    @staticmethod
    def forward(ctx: Any, _rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        assert transfer.tensors is not None
        arrived = transfer.tensors[1]
        transfer.wait()
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.start(grad, back=True), None


def start(rows: Tensor, transfer: Transfer) -> Tensor:
    """`rows` begin to travel; returns what `finish` takes."""
    handle: Tensor = _Start.apply(rows, transfer)
    return handle


def finish(handle: Tensor, transfer: Transfer) -> Tensor:
    """The rows that came."""
    arrived: Tensor = _Finish.apply(handle, transfer)
    return arrived
