"""What a step leaves for its metrics record: summed on the device, read once, reduced over ranks once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.model.decoder import Decoder, Losses, is_routed, layer_metrics
from megascale.model.routers import SigmoidRouter
from megascale.model.routing import Experts
from megascale.parallel.mesh import Mesh

RATIOS = {"dropped": "dropped_share", "residual": "residual", "policy_noise": "policy_noise"}
"""Metric of a routed layer by the entry of the report that it is the mean of."""


class Tally:
    """Adds up the losses, the routers' statistics and the stream weights of a step's micro-batches, on this rank's stages.

    The sums have the same places on all ranks, whatever their stages: lm loss, the routers' losses, and with P > 1 the P weights, their
    entropy, the streams' similarity and the number of tokens they are of; and for each routed layer the E loads, then sum and weight of
    each ratio. These are fp64: loads are exact, whoever counted them.
    """

    def __init__(self, model: Model, mesh: Mesh, auxiliary_weights: dict[str, float]):
        self.model, self.mesh, self.weights = model, mesh, auxiliary_weights
        self.streams = model.streams.count
        self.routed = [layer for layer in range(model.layers) if is_routed(layer, model)]
        self.sums: list[Tensor] = []
        self.statistics: dict[str, Tensor] = {}
        self.loads: dict[int, Tensor] = {}
        """choices of each expert by routed layer, over the whole step; once recorded"""

    @torch.no_grad()
    def add(self, losses: Losses, share: float) -> None:
        """Take one micro-batch on one stage; its loss tokens are `share` of the step's."""
        self.sums.append(self._values(losses, share))
        for name, value in losses.statistics.items():
            wide = (value.sum(0) if name.endswith("/load") else value).double()
            self.statistics[name] = self.statistics[name] + wide if name in self.statistics else wide

    def _values(self, losses: Losses, share: float) -> Tensor:
        device = self.mesh.world.device.torch
        zero = torch.zeros(1, device=device)
        # ranks that share the vocabulary all have the whole loss
        parts = [zero if losses.lm is None else losses.lm.detach().reshape(1).float() / self.mesh.size("tp")]
        for name, weight in self.weights.items():
            scale = weight if name in losses.rewarded else weight * share
            value = {**losses.auxiliary, **losses.rewarded}.get(name)
            parts.append(zero if value is None else value.detach().reshape(1).float() * scale)
        if losses.stream_weights is not None and losses.stream_similarity is not None:
            weights = losses.stream_weights.float()
            parts += [weights.sum(0), -(weights * weights.log()).sum().reshape(1), losses.stream_similarity.sum().reshape(1)]
            parts.append(weights.new_tensor([weights.shape[0]]))
        elif self.streams > 1:
            parts.append(torch.zeros(self.streams + 3, device=device))
        return torch.cat(parts)

    def record(self) -> dict[str, float]:
        """The metrics of the step, the same on all ranks; every value comes from sums over ranks."""
        values = self.mesh.world.sum(torch.stack(self.sums).sum(0)).tolist()
        names = list(self.weights)
        metrics = {"train/lm_loss": values[0], "train/total_loss": sum(values[: 1 + len(names)])}
        metrics |= {f"train/aux/{name}": value for name, value in zip(names, values[1:], strict=False)}
        if self.streams > 1:
            *weights, entropy, similar, tokens = values[1 + len(names) :]
            metrics["streams/aggregator_entropy"] = entropy / tokens / math.log(self.streams)
            metrics["streams/correlation"] = similar / tokens
            metrics |= {f"streams/weight_p{p}": weight / tokens for p, weight in enumerate(weights)}
        return metrics | self._routing() if self.routed else metrics

    def _routing(self) -> dict[str, float]:
        """The metrics of the routed layers, from all ranks that have them."""
        experts, ratios = self.model.experts.count, list(RATIOS)
        table = torch.zeros(len(self.routed), experts + 2 * len(ratios), dtype=torch.float64, device=self.mesh.world.device.torch)
        for row, layer in zip(table, self.routed, strict=True):
            parts = [row[:experts], *row[experts:].split(2)]
            for part, name in zip(parts, ("load", *ratios), strict=True):
                part += self.statistics.get(f"{layer_metrics(layer)}/{name}", 0)
        self.loads = dict(zip(self.routed, self.mesh.world.sum(table)[:, :experts], strict=True))
        metrics: dict[str, float] = {}
        for layer, row in zip(self.routed, table.tolist(), strict=True):
            metrics |= _load_metrics(layer_metrics(layer), row[:experts])
            for name, total, weight in zip(ratios, row[experts::2], row[experts + 1 :: 2], strict=True):
                if weight:
                    metrics[f"{layer_metrics(layer)}/{RATIOS[name]}"] = total / weight
        return metrics


def move_biases(decoders: Iterable[Decoder], loads: Mapping[int, Tensor]) -> None:
    """One step of the biases of all sigmoid routers here, from the loads [E] of the step by layer."""
    for decoder in decoders:
        for name, layer in decoder.layers.items():
            if isinstance(layer.feed_forward, Experts) and isinstance(layer.feed_forward.router, SigmoidRouter):
                layer.feed_forward.router.move_bias(loads[int(name)])


def _load_metrics(layer: str, load: list[float]) -> dict[str, float]:
    total, experts = sum(load), len(load)
    shares = [x / total for x in load]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return {
        f"{layer}/load_max_over_mean": max(shares) * experts,
        f"{layer}/load_entropy": entropy / math.log(experts),
        f"{layer}/idle_experts": float(sum(x == 0 for x in load)),
    }
