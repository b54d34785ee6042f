"""What RL-R's routers learn from the loss: REINFORCE with a baseline (Williams 1992; arXiv 2202.01169, section 3.2).

T tokens here, P streams, R routed layers of the whole model. `policies` [T, P, R, 3] holds of every choice its log-probability, the
baseline and the squared norm of the log-probability's gradient by the logits. It crosses pipeline stages beside the state, and its gradient
comes back the same way: the last stage, which alone knows the reward, need not know the routers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NUMBERS = 3
"""Numbers of one choice in `policies`."""


def join_policies(before: Tensor | None, here: Mapping[int, Tensor], layers: Sequence[int]) -> Tensor | None:
    """The policies of all layers up to this stage; zeros stand for those that come later.

    Args:
        before: of the stages before; none = this is the first.
        here: by layer, each [T, P, 3]; empty for a stage without routed layers.
        layers: the routed layers of the model.
    """
    if not here:
        return before
    like = next(iter(here.values()))
    columns = [torch.zeros_like(like)] * len(layers) if before is None else list(before.unbind(2))
    return torch.stack([here.get(layer, column) for layer, column in zip(layers, columns, strict=True)], 2)


def reinforce(
    policies: Tensor, reward: Tensor, rewarded: Tensor, scale: Tensor, streams: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of policies and baselines, and how noisy the policy's gradient is.

    A token's advantage A in a layer is its reward less the layer's baseline, without a gradient. All streams share the reward.

    Args:
        reward: [T], log-probability of each label, nats.
        rewarded: bool [T], whether there is one.
        scale: one over the number of loss tokens of the step.
        streams: P of the model, of which `policies` may hold some.

    Returns:
        policy = -scale sum A log pi / P and baseline = scale sum (reward - b)^2 / P, summed over tokens, streams and layers; and for
        each layer sum and number of A^2 |d log pi / d logits|^2, [R, 2].
    """
    log_pi, baseline, squared_norm = policies.unbind(-1)
    mask = rewarded[:, None, None].to(policies.dtype)
    error = (reward[:, None, None].to(policies.dtype) - baseline) * mask
    advantage = error.detach()
    weight = scale / streams
    losses = {"policy": -(advantage * log_pi).sum() * weight, "baseline": error.square().sum() * weight}
    noise = (advantage.square() * squared_norm.detach()).sum((0, 1))
    return losses, torch.stack([noise, (mask.sum() * policies.shape[1]).expand_as(noise)], 1)
