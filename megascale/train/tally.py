"""What a step leaves for its metrics record: summed on the device, read once, reduced over ranks once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.model.decoder import AUXILIARY, Losses, is_routed
from megascale.parallel.mesh import Mesh


class Tally:
    """Adds up the losses, the expert loads and the stream weights of a step's micro-batches, on this rank's stages.

    The sums have the same places on all ranks, whatever their stages: lm loss, auxiliary losses, and with P > 1 the P weights, their
    entropy and the number of tokens they are of.
    """

    def __init__(self, model: Model, mesh: Mesh, auxiliary_weights: dict[str, float]):
        self.model, self.mesh, self.weights = model, mesh, auxiliary_weights
        self.streams = model.streams.count
        self.sums: list[Tensor] = []
        self.loads: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, losses: Losses, share: float) -> None:
        """Take one micro-batch on one stage; its loss tokens are `share` of the step's."""
        self.sums.append(self._values(losses, share))
        for name, load in losses.loads.items():
            summed = load.sum(0)
            self.loads[name] = self.loads[name] + summed if name in self.loads else summed

    def _values(self, losses: Losses, share: float) -> Tensor:
        device = self.mesh.world.device.torch
        zero = torch.zeros(1, device=device)
        # ranks that share the vocabulary all have the whole loss
        parts = [zero if losses.lm is None else losses.lm.detach().reshape(1).float() / self.mesh.size("tp")]
        for name in AUXILIARY:
            value = losses.auxiliary.get(name)
            parts.append(zero if value is None else value.detach().reshape(1).float() * (share * self.weights[name]))
        if losses.stream_weights is not None:
            weights = losses.stream_weights.float()
            parts += [weights.sum(0), -(weights * weights.log()).sum().reshape(1), weights.new_tensor([weights.shape[0]])]
        elif self.streams > 1:
            parts.append(torch.zeros(self.streams + 2, device=device))
        return torch.cat(parts)

    def record(self) -> dict[str, float]:
        """The metrics of the step, the same on all ranks; every value comes from sums over ranks."""
        values = self.mesh.world.sum(torch.stack(self.sums).sum(0)).tolist()
        routed = [layer for layer in range(self.model.layers) if is_routed(layer, self.model)]
        metrics = {"train/lm_loss": values[0], "train/total_loss": sum(values[: 1 + len(AUXILIARY)])}
        if routed:
            metrics |= {f"train/aux/{name}": value for name, value in zip(AUXILIARY, values[1:], strict=False)}
        if self.streams > 1:
            *weights, entropy, tokens = values[1 + len(AUXILIARY) :]
            metrics["streams/aggregator_entropy"] = entropy / tokens / math.log(self.streams)
            metrics |= {f"streams/weight_p{p}": weight / tokens for p, weight in enumerate(weights)}
        if routed:
            for layer, load in zip(routed, self._all_loads(routed), strict=True):
                metrics |= _load_metrics(f"moe/layer_{layer:02d}", load)
        return metrics

    def _all_loads(self, routed: list[int]) -> list[list[float]]:
        """Choices by expert of every routed layer, from the ranks that have it."""
        experts = self.model.experts
        stacked = torch.zeros(len(routed), experts.count, device=self.mesh.world.device.torch)
        for row, layer in enumerate(routed):
            load = self.loads.get(f"moe/layer_{layer:02d}/load")
            if load is not None:
                stacked[row] = load
        # with the global scope all ranks of a stage have the whole population's load already
        summed = self.mesh.sum(stacked, "pp") if experts.scope == "global" else self.mesh.world.sum(stacked)
        return summed.tolist()


def _load_metrics(layer: str, load: list[float]) -> dict[str, float]:
    total, experts = sum(load), len(load)
    shares = [x / total for x in load]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return {
        f"{layer}/load_max_over_mean": max(shares) * experts,
        f"{layer}/load_entropy": entropy / math.log(experts),
        f"{layer}/idle_experts": float(sum(x == 0 for x in load)),
    }
