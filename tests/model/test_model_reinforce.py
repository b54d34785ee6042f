"""RL-R's learning signal against its definition, layer by layer, and its way through pipeline stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.model.loss import IGNORED
from megascale.model.origin import Draw
from megascale.model.reinforce import join_policies, reinforce
from megascale.model.routers import draw, log_probability
from tiny import origin, packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[9, 7], [16]])
MODEL = tiny_model(
    layers=3,
    streams={"count": 2, "prefix_tokens": 4},
    experts={"count": 4, "per_token": 1, "router": "rl_r", "every": 2},
    altup={"blocks": 2},
)


def test_policies_and_baselines_learn_what_reinforce_says() -> None:
    decoder = tiny_decoder(MODEL, spread=0.2)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs, outputs: seen.update({name: (inputs[0], outputs[1])})

    for name, layer in decoder.layers.items():
        if name != "1":
            layer.feed_forward.router.register_forward_hook(watch(name))
    scale = torch.tensor(0.05)
    losses = decoder.losses(*BATCH.inputs, BATCH.labels, scale, Draw(seed=3, step=4))
    assert seen.keys() == {"0", "2"}
    reward = -losses.token_losses.repeat_interleave(2)
    learned = (BATCH.labels.flatten() != IGNORED).repeat_interleave(2)
    policy, baseline, noise = [], [], {}
    for name, (x, experts) in seen.items():
        router = decoder.layers[name].feed_forward.router
        logits = x @ router.weight.T
        value = (F.silu(x.detach() @ router.baseline_hidden.T) @ router.baseline_out.T)[:, 0]
        log_pi = logits.log_softmax(-1).gather(-1, experts)[:, 0]
        advantage = (reward - value).detach()
        policy.append((-advantage * log_pi)[learned].sum() * 0.05 / 2)
        baseline.append((reward - value)[learned].square().sum() * 0.05 / 2)
        score = F.one_hot(experts[:, 0], 4) - logits.softmax(-1)
        noise[name] = (advantage[:, None] * score)[learned].square().sum(), learned.sum()
    for found, expected in ((losses.rewarded["policy"], sum(policy)), (losses.rewarded["baseline"], sum(baseline))):
        torch.testing.assert_close(found, expected)
        parameters = dict(decoder.named_parameters())
        gradients = [torch.autograd.grad(y, parameters.values(), retain_graph=True, allow_unused=True) for y in (found, expected)]
        reached = 0
        for name, got, want in zip(parameters, *gradients, strict=True):
            if want is None or not want.any():
                assert got is None or not got.any(), name
            else:
                torch.testing.assert_close(got, want, msg=name)
                reached += 1
        assert reached >= 2
    for name, expected in noise.items():
        torch.testing.assert_close(losses.statistics[f"moe/layer_{int(name):02d}/policy_noise"], torch.stack(expected).float())


def test_the_reward_itself_is_not_differentiated() -> None:
    decoder = tiny_decoder(MODEL, spread=0.2)
    losses = decoder.losses(*BATCH.inputs, BATCH.labels, torch.tensor(0.05))
    gradients = torch.autograd.grad(losses.rewarded["policy"], [decoder.head.weight, decoder.norm.weight], allow_unused=True)
    assert gradients == (None, None)


@pytest.mark.parametrize("kept", [(), ("0",), ("0", "1")], ids=str)
def test_stages_learn_what_the_whole_does(kept: tuple[str, ...]) -> None:
    """Cut behind these layers of the first stage, which may have no router."""
    whole, first, last = (tiny_decoder(MODEL, spread=0.2) for _ in range(3))
    for name in list(whole.layers):
        del (last if name in kept else first).layers[name]
    first.norm = first.aggregator = first.head = None
    last.embedding = None
    arguments = (*BATCH.inputs, BATCH.labels, torch.tensor(0.05))
    expected = whole.losses(*arguments, Draw(1, 2))
    state, before = first.advance(None, *arguments, draw=Draw(1, 2))
    assert (before.policies is None) == (kept == ())
    assert not before.rewarded
    _, found = last.advance(state, *arguments, draw=Draw(1, 2), policies=before.policies)
    for name, value in expected.rewarded.items():
        torch.testing.assert_close(found.rewarded[name], value)
    (sum(expected.rewarded.values()) + expected.lm).backward()
    (sum(found.rewarded.values()) + found.lm).backward()
    parts = {**dict(last.named_parameters()), **dict(first.named_parameters())}
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parts[name].grad, parameter.grad, msg=name)


def test_joining_fills_in_the_layers_here_and_keeps_the_others() -> None:
    here = {3: torch.full((2, 1, 3), 3.0)}
    joined = join_policies(None, here, [1, 3, 5])
    assert joined.shape == (2, 1, 3, 3)
    assert joined[:, :, 1].eq(3).all() and not joined[:, :, [0, 2]].any()
    both = join_policies(joined, {5: torch.full((2, 1, 3), 5.0)}, [1, 3, 5])
    assert [float(both[0, 0, i, 0]) for i in range(3)] == [0, 3, 5]
    assert join_policies(both, {}, [1, 3, 5]) is both
    assert join_policies(None, {}, [1, 3, 5]) is None


def test_the_policy_finds_the_expert_that_is_rewarded() -> None:
    weight = torch.zeros(4, 3).requires_grad_()
    kinds = torch.eye(3).repeat_interleave(40, 0)
    best = torch.tensor([2, 0, 1]).repeat_interleave(40)
    for step in range(60):
        logits = kinds @ weight.T
        experts = draw(logits.detach(), origin(120, step=step).draws(1, 1)[:, 0])
        log_pi, norm = log_probability(logits, experts)
        reward = (experts[:, 0] == best).float()
        policies = torch.stack([log_pi, torch.full_like(log_pi, 0.3), norm], -1)[:, None, None]
        losses, _ = reinforce(policies, reward, torch.ones(120, dtype=torch.bool), torch.tensor(1 / 120), policies.shape[1])
        (gradient,) = torch.autograd.grad(losses["policy"], weight)
        with torch.no_grad():
            weight -= 5 * gradient
    assert (torch.eye(3) @ weight.T).softmax(-1)[range(3), [2, 0, 1]].min() > 0.9
