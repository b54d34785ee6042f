"""A whole micro-batch on a GPU: from the host's memory to the gradients nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from megascale.data.batches import MicroBatch
from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from megascale.train.build import cast
from tiny import packed_batch, tiny_model

AXES = {"streams": {"count": 2, "prefix_tokens": 3}, "experts": {"count": 4, "per_token": 2, "width": 32}}


@pytest.mark.parametrize("altup", [{"blocks": 2}, {"form": "sequence", "stride": 3}], ids=["blocks", "sequence"])
def test_a_micro_batch_waits_for_nothing(device: torch.device, altup: dict[str, object]) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: the interpreter always waits")
    decoder = Decoder(tiny_model(width=64, heads=2, layers=4, altup=altup, **AXES))
    initialize(decoder, decoder.config, 1)
    cast(dict(decoder.to(device).named_parameters()), "bf16")
    batch, scale = packed_batch([[20, 31, 13], [64]]), torch.tensor(1 / 128, device=device)
    micro = MicroBatch(batch.tokens, batch.labels, batch.positions, batch.documents)
    for step in range(3):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            here = micro.to(device)
            losses = decoder.losses(here.tokens, here.positions, here.documents, here.labels, scale)
            assert losses.lm is not None
            sum(losses.auxiliary.values(), losses.lm).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
