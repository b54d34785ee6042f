"""Room for as many rows of each expert as a capacity lets pass, so that what ranks exchange has a size that the host knows.

N rows sorted by expert, behind them those of no expert; d width, E experts, S slots of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale.kernels.dispatch import take_rows_or_zeros


class Slots:
    """Where the rows of one dispatch stand among E x S slots, of which the empty ones are zeros.

    Args:
        counts: [E], at most S each.
        rows: N.
        slots: S.
        fused: whether kernels move them (`megascale.kernels.fused.is_fused`).
    """

    def __init__(self, counts: Tensor, rows: int, slots: int, fused: bool | None = None):
        self.size, self.fused = counts.numel() * slots, fused
        first, device = counts.cumsum(0) - counts, counts.device
        slot = torch.arange(slots, device=device)
        # the row of each slot, N for none; and the slot of each row, E S for none
        row = torch.where(slot < counts[:, None], first[:, None] + slot, rows).flatten()
        there = torch.arange(self.size, device=device)
        place = torch.full((rows + 1,), self.size, device=device).scatter_(0, row, there)
        self.row, self.place = row, place[:rows]

    def fill(self, rows: Tensor) -> Tensor:
        """[N, d] -> [E S, d]."""
        return take_rows_or_zeros(rows, self.row, self.place[:, None], self.fused)

    def empty(self, slots: Tensor) -> Tensor:
        """[E S, d] -> [N, d], zeros for rows of no expert."""
        return take_rows_or_zeros(slots, self.place, self.row[:, None], self.fused)
