"""What the trainer asks of an engine: gradients in, one optimizer step out, and tensors to save."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.tensors import Tensors
from megascale.parallel.placement import Placement


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
    new: bool = False
    """added by the phase under way"""


@dataclass(frozen=True)
class Share:
    """One rank's part of the model, all of it by global name."""

    groups: Sequence[OptimizerGroup]
    """of the trained parameters; those that this rank lacks are absent from them"""
    weights: Mapping[str, Tensor]
    """fp32, of all parameters: the parameter's own memory, or a master where the parameter is bf16"""
    parameters: Mapping[str, nn.Parameter]
    placements: Mapping[str, Placement]
    """what of the global parameters they are"""


class Engine(Protocol):
    """Reduces gradients over the ranks, clips, steps.

    Losses are sums of contributions: a gradient is the sum over the ranks that hold the parameter, never their mean.
    """

    groups: Sequence[OptimizerGroup]
    parameters: Mapping[str, nn.Parameter]
    """all of this rank's, by global name"""
    placements: Mapping[str, Placement]
    """what of the global parameters they are"""

    def begin(self) -> None:
        """Before the first backward of a step. What follows may be `backward`, or a pipeline schedule that runs backward itself."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; with the last one of a step their reduction over ranks may start."""

    def gradient_norm(self) -> float:
        """Finish the reduction and return the global norm, before clipping; the same on all ranks."""

    def step(self, lr_scale: float, new_scale: float = 1.0) -> None:
        """Clip, update with lr_scale times each group's peak learning rate (new groups: times new_scale), and forget the gradients."""

    def skip(self) -> None:
        """Forget the gradients and change nothing else."""

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Give parameters other weights, by global name: fp32, each all of what this rank holds. The optimizer's state stays."""

    def rectangles(self) -> Iterable[Rectangle]:
        """The weights (fp32 masters) and optimizer state that this rank writes into a checkpoint."""

    def load(self, reader: Tensors, new: Collection[str] = (), moments: bool = True) -> None:
        """Restore what `rectangles` wrote, in any layout and by any engine.

        Args:
            reader: a checkpoint, or (without moments) any model's tensors under these names.
            new: names of parameters that the checkpoint need not have: they keep their weights and have no moments yet.
            moments: also the optimizer's state; without, it starts anew.
        """
