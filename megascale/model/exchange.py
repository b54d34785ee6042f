"""Named points where a module exchanges data with other ranks, as they are on one device, and the declaration of what may be split.

A module owns its points as attributes; `megascale.parallel.apply` replaces them according to the layout, and nothing else in the model
differs between one process and a cluster. T tokens, N rows of tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]
"""An exchange point that takes and returns tokens or counts."""
OrderedExchange = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes counts; returns their sum over the ranks whose tokens come before this rank's, and over all ranks."""


@dataclass(frozen=True)
class Split:
    """How a parameter may be shared by the ranks of an axis: by whole units along one dimension.

    A module declares its splits in an attribute `splits`, by the parameter's name inside the module: one, or several along different
    dimensions. All ranks hold those without one.
    """

    dim: int
    axis: Literal["tp", "ep", "etp"]
    units: int
    """heads, experts, rows of the vocabulary: what must stay together"""


def unit_range(units: int, part: int, parts: int) -> range:
    """The units of one of `parts` ranks: contiguous and balanced; where ranks outnumber units, several ranks hold the same one."""
    first = part * units // parts
    return range(first, max((part + 1) * units // parts, first + 1))


def identity(x: Tensor) -> Tensor:
    """On one device: gather_tokens, scatter_tokens, share_tokens, population_sum; merge_streams, scatter_streams, share_streams,
    share_labels, join_losses; share_context, join_context; join_logits.
    """
    return x


def only_rank(counts: Tensor) -> tuple[Tensor, Tensor]:
    """population_order on one device: no tokens come before."""
    return torch.zeros_like(counts), counts


def keep_rows(copies: Tensor, counts: Tensor, _most: int | None, _fused: bool | None) -> tuple[Tensor, Tensor]:
    """dispatch on one device: rows [N, d] sorted by expert, their numbers [E], the most that any of these can be, where that is less
    than what the tokens here could make it, and whether kernels move them (`megascale.kernels.fused.is_fused`). Rows behind the last
    expert's are for none. Starts what `receive` ends, so that the caller may compute something else meanwhile.
    """
    return copies, counts


def are_here(parcel: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, None]:
    """receive on one device: what `dispatch` returned -> rows for the experts here, sorted by expert, their numbers, and what `combine`
    needs to undo it. Rows behind the last expert's are for none.
    """
    return *parcel, None


def take_back(outputs: Tensor, _way: object) -> Tensor:
    """combine on one device: the experts' outputs in the order of `dispatch`'s input; anything for rows that are for no expert."""
    return outputs


def whole_vocabulary(normaliser: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """join_vocabulary on one device: log-sum-exp [T] and the label's logit [T] over the rows here are those over all rows."""
    return normaliser, chosen
