"""What a step leaves for its metrics record: summed on the device, read once, reduced over ranks once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megascale.model.decoder import AUXILIARY, Losses
from megascale.parallel.world import World


class Tally:
    """Adds up the losses, the expert loads and the stream weights of a step's micro-batches."""

    def __init__(self, streams: int, auxiliary_weights: dict[str, float], loads_are_global: bool):
        self.streams, self.weights, self.loads_are_global = streams, auxiliary_weights, loads_are_global
        self.sums: list[Tensor] = []
        self.loads: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, losses: Losses, share: float) -> None:
        """Take one micro-batch, whose loss tokens are `share` of the step's."""
        parts = [losses.lm.detach().reshape(1).float()]
        for name in AUXILIARY:
            value = losses.auxiliary.get(name)
            parts.append(
                parts[0].new_zeros(1) if value is None else value.detach().reshape(1).float() * (share * self.weights[name])
            )
        if losses.stream_weights is not None:
            weights = losses.stream_weights.float()
            parts += [weights.sum(0), -(weights * weights.log()).sum().reshape(1), weights.new_tensor([weights.shape[0]])]
        self.sums.append(torch.cat(parts))
        for name, load in losses.loads.items():
            summed = load.sum(0)
            self.loads[name] = self.loads[name] + summed if name in self.loads else summed

    def record(self, world: World) -> dict[str, float]:
        """The metrics of the step, the same on all ranks; every value comes from sums over ranks."""
        values = world.sum(torch.stack(self.sums).sum(0)).tolist()
        metrics = {"train/lm_loss": values[0], "train/total_loss": sum(values[: 1 + len(AUXILIARY)])}
        if self.loads:
            metrics |= {f"train/aux/{name}": value for name, value in zip(AUXILIARY, values[1:], strict=False)}
        if self.streams > 1:
            *weights, entropy, tokens = values[1 + len(AUXILIARY) :]
            metrics["streams/aggregator_entropy"] = entropy / tokens / math.log(self.streams)
            metrics |= {f"streams/weight_p{p}": weight / tokens for p, weight in enumerate(weights)}
        if self.loads:
            stacked = torch.stack(list(self.loads.values()))
            if not self.loads_are_global:
                world.sum(stacked)
            for name, load in zip(self.loads, stacked.tolist(), strict=True):
                metrics |= _load_metrics(name.removesuffix("/load"), load)
        return metrics


def _load_metrics(layer: str, load: list[float]) -> dict[str, float]:
    total, experts = sum(load), len(load)
    shares = [x / total for x in load]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return {
        f"{layer}/load_max_over_mean": max(shares) * experts,
        f"{layer}/load_entropy": entropy / math.log(experts),
        f"{layer}/idle_experts": float(sum(x == 0 for x in load)),
    }
