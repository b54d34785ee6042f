"""What the trainer asks of an engine: gradients in, one optimizer step out, and tensors to save."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.load import CheckpointReader


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that share an optimizer, a peak learning rate and a weight decay."""

    name: str
    optimizer: str
    """adamw or muon"""
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]
    """by global name"""


class Engine(Protocol):
    """Reduces gradients over the ranks, clips, steps. Losses are sums of contributions: gradients are summed over ranks, never averaged."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; with the last one of a step their reduction over ranks starts."""

    def gradient_norm(self) -> float:
        """Finish the reduction and return the global norm, before clipping."""

    def step(self, lr_scale: float) -> None:
        """Clip, update with lr_scale times each group's peak learning rate, and forget the gradients."""

    def skip(self) -> None:
        """Forget the gradients and change nothing else."""

    def rectangles(self) -> Iterable[Rectangle]:
        """The weights (fp32 masters) and optimizer state that this rank writes into a checkpoint."""

    def load(self, reader: CheckpointReader) -> None:
        """Restore what `rectangles` wrote, in any layout."""
