"""A quiet start of streams on a trained trunk (`model.streams.prefix_start: quiet`): prefix keys that its queries turn away from.

n prefix slots with scores about 0 take n of n + sum exp(s) of a token's attention: nearly all of it at the start of a document. No key
takes less on average whatever the trunk is: E[exp(q k)] >= exp(E[q] k), and without the trunk nobody knows where its mean query points.
So the keys are fitted to it: of all keys the one that takes least from queries N(m, C) is k = -sqrt(D) C^-1 m, with
E[exp(q k / sqrt(D))] = exp(-m C^-1 m / 2). The random start, which parts the streams, is added to it.

T tokens, P streams, H query heads, G key/value heads, D head width, n slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.model.attention import Attention
from megascale.model.initialize import PREFIX_STD, normal_rectangle
from megascale.train.batch_stream import step_batches
from megascale.train.build import Parts

ROUNDS = 2
"""The first keys are fitted while the prefixes still disturb the layers above them."""
RIDGE = 0.1
"""Added to C, as a share of its mean variance: directions that few queries have count for little."""


@contextmanager
def _observed(attention: Attention, moments: list[Tensor]) -> Iterator[None]:
    """Append to `moments`, for each key/value head here, the sum of (1, q) (1, q)^T over the queries that meet its keys: [G, 1+D, 1+D]."""
    project = attention.project

    def observe(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(x, cos, sin)
        streams = x.shape[1]
        # [T, P*H, D] -> [G, T*P*H/G, D]
        rows = q.float().unflatten(1, (streams, k.shape[1] // streams, -1)).permute(2, 0, 1, 3, 4).flatten(1, 3)
        rows = torch.cat([rows.new_ones(*rows.shape[:2], 1), rows], 2)
        moments.append((rows.transpose(1, 2) @ rows).double())
        return q, k, v

    attention.project = observe  # type: ignore[method-assign]
    try:
        yield
    finally:
        del attention.project


def least_attended_key(moments: Tensor) -> Tensor:
    """k [G, D] from the sums of `_observed` [G, 1+D, 1+D]."""
    moments = moments / moments[:, :1, :1]
    mean, second = moments[:, 0, 1:], moments[:, 1:, 1:]
    covariance = second - mean[:, :, None] * mean[:, None]
    variance = covariance.diagonal(dim1=1, dim2=2)
    covariance = covariance + torch.diag_embed(RIDGE * variance.mean(1, keepdim=True).expand_as(variance))
    return -torch.linalg.solve(covariance, mean) * mean.shape[1] ** 0.5


def _keys(parts: Parts, step: int) -> dict[int, Tensor]:
    """The key of each layer on this rank, by the queries of the first micro-batch of a step, of all ranks with the same heads."""
    mesh, readers = parts.mesh, parts.mesh.along("dp")
    batch = next(
        step_batches(parts.data.train, parts.config.batch, step, step, readers.index(mesh.world.rank), len(readers))
    ).micro_batches[0]
    moments: dict[int, list[Tensor]] = {}
    # what is compiled would not see that `project` is another function
    with ExitStack() as stack, torch.compiler.set_stance("force_eager"):
        for decoder in parts.stages.modules():
            for name, layer in decoder.layers.items():
                assert isinstance(layer.attention, Attention)
                stack.enter_context(_observed(layer.attention, moments.setdefault(int(name), [])))
        parts.stages.train(False)
        parts.stages.evaluate(batch)
        parts.stages.train(True)
    sums = torch.stack([torch.stack(found).sum(0) for found in moments.values()])
    holders = parts.engine.placements[_parameter(parts, next(iter(moments)))].holders
    if len(holders) > 1:
        dist.all_reduce(sums, group=mesh.group(holders))
    return {layer: least_attended_key(one).float() for layer, one in zip(moments, sums, strict=True)}


def _parameter(parts: Parts, layer: int) -> str:
    """What the key of a layer goes into: its prefix keys, or the bias that its network ends with."""
    network = parts.config.model.streams.reparameterise is not None
    return f"layers.{layer}.attention.{'prefix_network.key.bias' if network else 'prefix_k'}"


@torch.no_grad()
def quiet_prefixes(parts: Parts, step: int) -> None:
    """Turn the new prefix keys away from the queries of the trunk, whose weights are loaded, in place; the same in every layout but for
    rounding.

    Args:
        step: the next one; what is read first gives the queries.
    """
    streams = parts.config.model.streams
    for _ in range(ROUNDS):
        weights = {}
        for layer, key in _keys(parts, step).items():
            name = _parameter(parts, layer)
            place = parts.engine.placements[name]
            if streams.reparameterise is not None:
                weights[name] = key.flatten()
                continue
            sizes = (streams.count, key.shape[0], streams.prefix_tokens, key.shape[1])
            start = normal_rectangle(parts.config.run.seed, name, place.global_shape, PREFIX_STD, place.offsets, sizes)
            weights[name] = start.to(key.device) + key[:, None]
        parts.engine.adopt(weights)
