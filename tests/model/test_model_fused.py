"""With kernels, no part of the model makes a tensor as large as the state in fp32, concatenates one, or waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megascale.data.batches import MicroBatch
from megascale.model.altup import AltUpResidual
from megascale.model.decoder import Decoder
from megascale.model.routers import ROUTERS
from megascale.model.streams import Aggregator
from tiny import packed_batch, tiny_model

TOKENS, STREAMS, BLOCKS, WIDTH = 24, 4, 2, 64
ONE_BLOCK = TOKENS * STREAMS * WIDTH


class Watch(TorchDispatchMode):
    """Notes what is as large as one block of the state and should not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Mapping[str, Any] | None = None) -> Any:
        result = operator(*arguments, **(options or {}))
        name = operator._schema.name
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.numel() >= ONE_BLOCK:
                if x.dtype == torch.float32:
                    self.found.add(f"{name} in fp32")
                if name in ("aten::cat", "aten::stack", "aten::clone"):
                    self.found.add(name)
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::bincount")
        if name in waits and any(isinstance(x, Tensor) and not x.is_cpu for x in tree_leaves(arguments)):
            self.found.add(f"{name} waits")
        return result


def aggregator(fused: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    module = Aggregator(WIDTH, STREAMS, 0.1).bfloat16()
    module.fused = fused
    return module, (torch.empty(TOKENS, STREAMS, WIDTH, dtype=torch.bfloat16, requires_grad=True),)


def residual(fused: bool, **settings: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """AltUp's part behind a layer."""
    model = tiny_model(width=WIDTH, altup={"blocks": BLOCKS, **settings})

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.residual = AltUpResidual(model, 1)
            self.residual.fused = fused

        def forward(self, state: Tensor, update: Tensor) -> tuple[Tensor]:
            parts = self.residual.split(state)
            return (self.residual(parts, update + self.residual.read(parts)),)

    state = torch.empty(TOKENS, STREAMS, BLOCKS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return Behind(), (state, torch.empty(TOKENS, STREAMS, WIDTH, dtype=torch.bfloat16, requires_grad=True))


PARTS = {
    "aggregator": aggregator,
    "altup, old": lambda fused: residual(fused),
    "altup, predicted": lambda fused: residual(fused, read="predicted"),
}


def watched(part: str, fused: bool) -> set[str]:
    with torch.device("meta"):
        module, inputs = PARTS[part](fused)
    with Watch() as watch:
        out = module(*inputs)[0]
        out.backward(torch.empty_like(out))
    return watch.found


@pytest.mark.parametrize("part", PARTS)
def test_nothing_as_large_as_the_state_is_made_but_results(part: str) -> None:
    assert watched(part, True) == set()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_a_whole_forward_and_backward_pass_waits_for_nothing(router: str, capacity: float | None) -> None:
    """On tensors without values, but for the documents, which stay on the host. (Behind it the step waits once, for the norm of the
    gradients, which the guard has to know.)
    """
    per_token = 1 if router in ("hash", "rl_r") else 2
    experts = {"count": 4, "per_token": per_token, "width": 16, "router": router, "capacity_factor": capacity, "shared": 1}
    model = tiny_model(streams={"count": 2, "prefix_tokens": 3}, altup={"blocks": 2}, experts=experts)
    batch = packed_batch([[5, 9, 2], [16]])
    with torch.device("meta"):
        decoder = Decoder(model)
        for module in decoder.modules():
            if hasattr(module, "fused"):
                module.fused = True
        with Watch() as watch:
            here = MicroBatch(batch.tokens, batch.labels, batch.positions, batch.documents).to(torch.device("meta"))
            assert here.documents.is_cpu, "to count borders on a device is to wait for it"
            losses = decoder.losses(here.tokens, here.positions, here.documents, here.labels, torch.empty(()))
            assert losses.lm is not None
            sum({**losses.auxiliary, **losses.rewarded}.values(), losses.lm).backward()
    assert not any(name.endswith("waits") for name in watch.found)


@pytest.mark.parametrize("part", PARTS)
def test_plain_operations_would_be_noticed(part: str) -> None:
    assert any(name.endswith("in fp32") for name in watched(part, False))
