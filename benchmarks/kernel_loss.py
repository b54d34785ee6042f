"""The head with its cross entropy, forward and backward: ours in chunks, against whole logits, torch's chunked operator and Liger's.

T tokens, d width, V vocabulary. The floor is the time of the three bare GEMMs at the rate measured here: nothing else needs to leave the
chip. Ours accumulates the head's gradient in fp32; the others in bf16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import form_rows, milliseconds
from megascale.model import loss as module
from megascale.model.loss import LossKernels, linear_cross_entropy

SHAPES = [(8192, 2048, 32768), (8192, 4096, 131072)]
SMALL_SHAPES = [(1024, 256, 4096)]


def _ours(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, labels, torch.tensor(1 / x.shape[0], device=x.device))[0]


def _whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.t()).float(), labels)


def _torch_chunked(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def _liger() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Liger's fused loss, where it is installed; its kernels need a GPU."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, labels: criterion(weight, x, labels)


def _forms() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    forms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": _ours,
        "whole logits, eager": _whole,
        "whole logits, compiled": torch.compile(_whole, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        forms["torch, chunked"] = _torch_chunked
    liger = _liger()
    return forms if liger is None else forms | {"liger": liger}


def _train(form: Callable[..., Tensor], x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(x, weight, labels), (x, weight))


def _gemms(x: Tensor, weight: Tensor, logits: Tensor) -> None:
    x, weight = x.detach(), weight.detach()
    for start in range(0, x.shape[0], module.CHUNK):
        part = slice(start, start + module.CHUNK)
        torch.mm(x[part], weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), x[part])


def _shape_rows(device: torch.device, tokens: int, width: int, vocabulary: int, rounds: int) -> list[dict[str, Any]]:
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, width, generator=draw, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=draw, device=device) * width**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
    logits = torch.empty(min(module.CHUNK, tokens), vocabulary, dtype=torch.bfloat16, device=device)
    forms = _forms()
    runs: dict[str, Callable[[], object]] = {name: partial(_train, form, x, weight, labels) for name, form in forms.items()}
    times = milliseconds(device, runs | {"floor": partial(_gemms, x, weight, logits)}, rounds)
    floor = {"TFLOP": 6 * tokens * width * vocabulary / 1e12}
    return form_rows(device, f"T={tokens} d={width} V={vocabulary}", runs, times, times["floor"], floor)


def rows(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The table: one row a shape and form, in bf16. `small` is for seconds on a CPU, where only ratios mean something."""
    LossKernels.compile()  # as a run has them
    return [row for shape in (SMALL_SHAPES if small else SHAPES) for row in _shape_rows(device, *shape, 5 if small else 20)]
