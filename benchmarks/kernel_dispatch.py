"""Rows to their experts and back, part by part, and the whole expert layer: ours, eager, compiled, and public ones.

T tokens, d width, E experts, k per token, f expert width, M = T k. A part's floor is the bytes it must move at the rate at which a large
tensor is copied here; the layer's is the time of its nine grouped products alone. Choices are even but for chance, weights and gradients
random, all rows bf16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import attempt, form_rows, milliseconds
from megascale.config.resolve import resolve
from megascale.config.schema import Config, Experts, Model
from megascale.kernels.dispatch import combine_copies, copy_rows, sort_copies, sum_copies
from megascale.kernels.grouped import grouped_linear
from megascale.kernels.swiglu import weighted_swiglu
from megascale.model import routing

Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """T, d, E, k, f."""

    tokens: int
    width: int
    count: int
    per_token: int
    hidden: int

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.width} E={self.count} k={self.per_token} f={self.hidden}"

    @property
    def copies(self) -> int:
        return self.tokens * self.per_token


SHAPES = [Shape(32768, 2048, 128, 8, 768), Shape(32768, 4096, 128, 8, 512)]
SMALL_SHAPES = [Shape(512, 128, 8, 2, 256)]


class _Chosen(nn.Module):
    """A router that has decided."""

    def __init__(self, gates: Tensor, experts: Tensor):
        super().__init__()
        self.gates, self.experts = gates, experts

    def forward(self, _x: Tensor, _origin: object) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.gates, self.experts, {}


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, d], gates [T, k], experts [T, k]."""
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.tokens, shape.width, generator=draw, device=device).bfloat16()
    logits = torch.randn(shape.tokens, shape.count, generator=draw, device=device)
    gates, experts = logits.softmax(-1).topk(shape.per_token, -1)
    return x.requires_grad_(), (gates / gates.sum(-1, keepdim=True)).requires_grad_(), experts


# The parts ------------------------------------------------------------------------------------------------------------


def _one_hot_sort(experts: Tensor, count: int) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return F.one_hot(experts.flatten(), count).sum(0) + place[0]


def _index_add(outputs: Tensor, gates: Tensor, order: Tensor, tokens: int) -> Tensor:
    """The combination as many write it: an fp32 sum with atomics."""
    k = gates.shape[1]
    weighted = outputs.float() * gates.flatten()[order, None]
    return weighted.new_zeros(tokens, outputs.shape[1]).index_add_(0, order // k, weighted).to(outputs.dtype)


def _swiglu(gate: Tensor, up: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    return F.silu(gate) * up * gates.flatten()[order, None].to(gate.dtype)


@dataclass(frozen=True)
class _Part:
    """Forms of one part, their inputs, which of these get a gradient, and the bytes that forward and backward must move."""

    name: str
    forms: dict[str, Form]
    inputs: tuple[Any, ...]
    moved: tuple[float, float]

    def runs(self, backward: bool) -> dict[str, Callable[[], object]]:
        if not backward:
            return {name: partial(_without_gradient, form, self.inputs) for name, form in self.forms.items()}
        leaves = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        runs: dict[str, Callable[[], object]] = {}
        for name, form in self.forms.items():
            out = form(*self.inputs)
            grad = torch.randn_like(out)
            runs[name] = partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
        return runs


@torch.no_grad()
def _without_gradient(form: Form, inputs: tuple[Any, ...]) -> object:
    return form(*inputs)


def _parts(shape: Shape, device: torch.device) -> list[_Part]:
    x, gates, experts = _inputs(shape, device)
    order, place, counts = sort_copies(experts, shape.count)
    ends = counts.cumsum(0).to(torch.int32)
    outputs = torch.randn(shape.copies, shape.width, device=device).bfloat16().requires_grad_()
    gate, up = (torch.randn(shape.copies, shape.hidden, device=device).bfloat16().requires_grad_() for _ in range(2))
    compiled = partial(torch.compile, dynamic=False)
    unit, k = 2.0 * shape.tokens * shape.width, shape.per_token
    hidden = 2.0 * shape.copies * shape.hidden
    copies: dict[str, Form] = {
        "ours": copy_rows,
        "eager, x[index]": lambda x, order, place: x[order // k],
        "eager, known places": partial(copy_rows, fused=False),
        "compiled, known places": compiled(partial(copy_rows, fused=False)),
    }
    sums: dict[str, Form] = {
        "ours": combine_copies,
        "eager, index_add": lambda y, gates, order, place: _index_add(y, gates, order, shape.tokens),
        "eager, known places": partial(combine_copies, fused=False),
        "compiled, known places": compiled(partial(combine_copies, fused=False)),
    }
    swiglus: dict[str, Form] = {
        "ours": lambda gate, up, gates, order: weighted_swiglu(gate, up, gates, order, ends),
        "eager": _swiglu,
        "compiled": compiled(_swiglu),
    }
    sorts: dict[str, Form] = {
        "ours": lambda experts: sort_copies(experts, shape.count)[0],
        "eager, sort": lambda experts: sort_copies(experts, shape.count, False)[0],
        "eager, one-hot": lambda experts: _one_hot_sort(experts, shape.count),
    }
    return [
        _Part("sort", sorts, (experts,), (24.0 * shape.copies, 0)),
        _Part("copies", copies, (x, order, place), ((1 + k) * unit, (1 + k) * unit)),
        _Part("gated sum", sums, (outputs, gates, order, place), ((1 + k) * unit, (1 + 2 * k) * unit)),
        _Part("sum", {"ours": sum_copies}, (outputs, place), ((1 + k) * unit, (1 + k) * unit)),
        _Part("gated SwiGLU", swiglus, (gate, up, gates, order), (3 * hidden, 5 * hidden)),
    ]


def _bytes_per_ms(device: torch.device, small: bool) -> float:
    """What a copy reads and writes."""
    source = torch.randn(2**22 if small else 2**28, device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / milliseconds(device, {"copy": partial(target.copy_, source)}, 10)["copy"]


def rows(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The parts: one row a shape, part, direction and form. `small` is for seconds on a CPU, where only ratios mean something."""
    rate = _bytes_per_ms(device, small)
    table: list[dict[str, Any]] = []
    for shape in SMALL_SHAPES if small else SHAPES:
        torch._dynamo.reset()  # as many compiled forms as a function may have
        for part in _parts(shape, device):
            for backward, moved in enumerate(part.moved):
                if not moved:
                    continue
                runs = part.runs(bool(backward))
                times = milliseconds(device, runs, 5 if small else 20)
                case = f"{shape} {part.name}, {'backward' if backward else 'forward'}"
                table += form_rows(device, case, runs, times, moved / rate, {"GB": moved / 1e9})
    return table


# The layer ------------------------------------------------------------------------------------------------------------


def _layer(shape: Shape, device: torch.device, chosen: _Chosen, fused: bool | None) -> routing.Experts:
    settings = Experts(count=shape.count, per_token=shape.per_token, width=shape.hidden)
    model = Model(vocab_size=256, width=shape.width, layers=1, heads=shape.width // 64, experts=settings)
    with device:
        layer = routing.Experts(resolve(Config(model=model)).model).bfloat16()
    for weight in (layer.gate, layer.up, layer.down):
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    layer.router, layer.fused = chosen, fused  # type: ignore[assignment]
    return layer


def _transformers(shape: Shape, device: torch.device) -> nn.Module | None:
    """transformers' expert block on the same grouped product, without its router, where it is installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_local_experts=shape.count,
        num_experts_per_tok=shape.per_token,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    with device:
        block = MixtralExperts(config).bfloat16()
    for weight in block.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return block


def _forms(shape: Shape, device: torch.device, chosen: _Chosen) -> dict[str, tuple[Form, list[Tensor]]]:
    """Each form of the layer, a function of x [T, d], and its weights."""
    forms: dict[str, tuple[Form, list[Tensor]]] = {}
    for name, fused in (("ours", None), ("plain, eager", False), ("plain, compiled", False)):
        layer = _layer(shape, device, chosen, fused)
        if name == "plain, compiled":
            layer.compile(dynamic=False)
        forms[name] = (lambda x, layer=layer: layer(x[:, None], None)[0], [layer.gate, layer.up, layer.down])
    block, _ = attempt(partial(_transformers, shape, device))
    if block is not None:
        forms["transformers, grouped_mm"] = (lambda x: block(x, chosen.experts, chosen.gates), list(block.parameters()))
    if importlib.util.find_spec("liger_kernel") is not None and device.type == "cuda":
        liger, _ = attempt(partial(_liger, shape, device, chosen))
        if liger is not None:
            forms["liger"] = liger
    return forms


def _liger(shape: Shape, device: torch.device, chosen: _Chosen) -> tuple[Form, list[Tensor]]:
    from liger_kernel.ops import LigerFusedMoEFunction

    gate_up, down = (
        nn.Parameter(torch.randn(shape.count, *sizes, device=device).bfloat16() * sizes[1] ** -0.5)
        for sizes in ((2 * shape.hidden, shape.width), (shape.width, shape.hidden))
    )
    index = chosen.experts.int()
    return lambda x: LigerFusedMoEFunction.apply(x, gate_up, down, index, chosen.gates.to(x.dtype)), [gate_up, down]


def _train(form: Form, leaves: list[Tensor], x: Tensor, grad: Tensor) -> object:
    out = form(x)
    return torch.autograd.grad(out, [x, *leaves], grad.view_as(out))


def _products(layer: routing.Experts, x: Tensor, hidden: Tensor, ends: Tensor) -> None:
    """The layer's grouped products, forward and backward, on rows that are sorted."""
    for weight, rows, grad in ((layer.gate, x, hidden), (layer.up, x, hidden), (layer.down, hidden, x)):
        torch.autograd.grad(grouped_linear(rows, weight, ends), (rows, weight), grad.detach())


def layer_rows(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The layer behind its router, forward and backward: one row a shape and form, with the rate of the products it has to form."""
    table = []
    for shape in SMALL_SHAPES if small else SHAPES:
        torch._dynamo.reset()
        x, gates, experts = _inputs(shape, device)
        chosen = _Chosen(gates, experts)
        forms = _forms(shape, device, chosen)
        grad = torch.randn_like(x)
        runs: dict[str, Callable[[], object]] = {
            name: partial(_train, form, [*weights, gates], x, grad) for name, (form, weights) in forms.items()
        }
        layer = _layer(shape, device, chosen, False)
        copies, hidden = (
            torch.randn(shape.copies, n, device=device).bfloat16().requires_grad_() for n in (shape.width, shape.hidden)
        )
        ends = sort_copies(experts, shape.count)[2].cumsum(0).to(torch.int32)
        floor = partial(_products, layer, copies, hidden, ends)
        times = milliseconds(device, runs | {"floor": floor}, 5 if small else 10)
        flops = 18.0 * shape.copies * shape.width * shape.hidden
        found = form_rows(device, str(shape), runs, times, times["floor"], {})
        table += [row if row["ms"] == "failed" else row | {"TFLOP/s": flops / row["ms"] / 1e9} for row in found]
    return table
