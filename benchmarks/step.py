"""Time and memory of forward + backward: our plain decoder against transformers' Llama, and each axis against what its FLOPs predict.

`python -m benchmarks step`. The optimizer is left out: both sides would use torch's.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import attempt, free, milliseconds, peak_allocated_mib, peak_memory_mib, print_table, write_result
from megascale.config.resolve import resolve
from megascale.config.schema import AltUp, Config, Experts, Model, Streams
from megascale.model.accounting import flops_per_token
from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from megascale.observe.throughput import peak_flops
from megascale.parallel.device import choose_device
from megascale.parallel.plain import allow_fp32_gradient
from megascale.parallel.recompute import apply_recompute
from megascale.train.build import cast
from megascale.train.compiling import compile_layers


@dataclass(frozen=True)
class Shape:
    """The dense decoder that everything is compared with, and its batch."""

    width: int
    layers: int
    vocabulary: int
    batch: int
    """sequences"""
    length: int
    """tokens per sequence"""
    precision: str
    device: str

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Options of a shape; what is not given is small on a CPU, and a model of 1.5 B parameters on a GPU."""
        for name, text in (("width", ""), ("layers", ""), ("vocabulary", ""), ("batch", "sequences"), ("length", "tokens each")):
            parser.add_argument(f"--{name}", type=int, help=text)
        parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def of(cls, given: argparse.Namespace) -> Shape:
        """The shape that options describe."""
        names = ("width", "layers", "vocabulary", "batch", "length")
        default = dict(zip(names, (2048, 24, 32768, 4, 4096) if given.device == "cuda" else (512, 4, 4096, 8, 512), strict=True))
        chosen = {name: default[name] if getattr(given, name) is None else getattr(given, name) for name in names}
        return cls(**chosen, precision=given.precision, device=given.device)

    @property
    def sequences(self) -> dict[str, int]:
        """Of each model's batch where it is another than the plain one's: with eight streams eight times as much happens to a token."""
        return {"P=8": max(self.batch // 8, 1)}


def plain(shape: Shape) -> Model:
    """The dense decoder."""
    return Model(
        vocab_size=shape.vocabulary,
        width=shape.width,
        layers=shape.layers,
        heads=shape.width // (128 if shape.width >= 2048 else 64),
    )


def axes(model: Model, shape: Shape) -> dict[str, Model]:
    """The plain model and one with each axis, and with all: small ones on a CPU, what people train on a GPU. As many FLOPs of expert
    layers as of dense ones.
    """
    ffn = resolve(Config(model=model)).model.ffn_width
    assert ffn is not None
    if shape.device == "cuda":
        wanted: dict[str, dict[str, Any]] = {
            "P=8": {"streams": Streams(count=8, prefix_tokens=48)},
            "E=64 k=8": {"experts": Experts(count=64, per_token=8, width=-(-ffn // 8 // 64) * 64)},
            "K=2": {"altup": AltUp(blocks=2)},
        }
    else:
        wanted = {
            "P=2": {"streams": Streams(count=2, prefix_tokens=48)},
            "E=8": {"experts": Experts(count=8, width=ffn)},
            "K=2": {"altup": AltUp(blocks=2)},
        }
        wanted["P=2 E=8 K=2"] = {key: value for update in wanted.values() for key, value in update.items()}
    return {"plain": model} | {name: model.model_copy(update=update) for name, update in wanted.items()}


def decoder_of(model: Model, shape: Shape, device: str, recompute: str = "none") -> Decoder:
    """A decoder as a run has it, its fp32 gradients there from the start, as an engine has them."""
    model = resolve(Config(model=model)).model
    with torch.device(device):
        decoder = Decoder(model)
    if device != "meta":
        initialize(decoder, model, 1)
    cast(dict(decoder.named_parameters()), shape.precision)
    for name, parameter in decoder.named_parameters():
        allow_fp32_gradient(name, parameter)
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    apply_recompute(decoder, recompute)
    return decoder


def step_of(
    decoder: Decoder, shape: Shape, device: torch.device, sequences: int | None = None
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """The forward and the backward pass of a micro-batch of random tokens. Gradients add up, as in a step of several micro-batches."""
    batch, length = sequences or shape.batch, shape.length
    tokens = torch.randint(shape.vocabulary, (batch, length), device=device)
    positions = torch.arange(length, device=device).expand(batch, -1)
    documents, scale = torch.zeros_like(tokens, dtype=torch.int32), torch.tensor(1 / (batch * length), device=device)

    def forward() -> Tensor:
        losses = decoder.losses(tokens, positions, documents, tokens, scale)
        assert losses.lm is not None
        return sum(losses.auxiliary.values(), losses.lm)

    return forward, lambda loss: loss.backward()


def ours(model: Model, shape: Shape, compiled: bool, sequences: int | None = None) -> Callable[[], None]:
    """A function that runs one forward and backward pass of our decoder."""
    decoder = decoder_of(model, shape, shape.device)
    if compiled:
        compile_layers([decoder], "on", torch.device(shape.device), print)
    forward, backward = step_of(decoder, shape, torch.device(shape.device), sequences)
    return lambda: backward(forward())


def transformers_llama(model: Model, shape: Shape, compiled: bool) -> Callable[[], None]:
    """The same for transformers' LlamaForCausalLM of the same shape (SDPA attention), with the loss it would train with."""
    import transformers

    LlamaConfig, LlamaForCausalLM = (getattr(transformers, name) for name in ("LlamaConfig", "LlamaForCausalLM"))  # untyped
    model = resolve(Config(model=model)).model
    with torch.device(shape.device):
        llama: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary, hidden_size=model.width, num_hidden_layers=model.layers, num_attention_heads=model.heads,
                num_key_value_heads=model.kv_heads, intermediate_size=model.ffn_width, attn_implementation="sdpa", use_cache=False,
            )
        )  # fmt: skip
    if shape.precision == "bf16":
        llama = llama.to(torch.bfloat16)
    forward = torch.compile(llama) if compiled else llama
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=shape.device)

    def run() -> None:
        logits = forward(tokens).logits
        F.cross_entropy(logits.float().view(-1, shape.vocabulary), tokens.flatten()).backward()

    return run


def _run_twice(maker: Callable[..., Callable[[], None]], *arguments: object) -> None:
    run = maker(*arguments)
    run()
    run()


Maker = tuple[Callable[..., Callable[[], None]], tuple[Any, ...]]
"""What makes a step, and of what."""


def measured(device: torch.device, makers: Mapping[str, Maker], rounds: int, memory: bool) -> dict[str, dict[str, Any]]:
    """ms of each step, MiB of its peak if asked for, or why it failed. On a CPU, which others may use meanwhile, they run in turn; on a GPU
    one model after the other, because not all of them fit.
    """
    if device.type == "cuda":
        return {name: _alone(device, name, maker, rounds, memory) for name, maker in makers.items()}
    times = milliseconds(device, {name: make(*arguments) for name, (make, arguments) in makers.items()}, rounds)
    found: dict[str, dict[str, Any]] = {name: {"ms": ms} for name, ms in times.items()}
    for name, (make, arguments) in makers.items() if memory else ():
        found[name]["peak_mib"] = peak_memory_mib(_run_twice, make, *arguments)
    return found


def _alone(device: torch.device, name: str, maker: Maker, rounds: int, memory: bool) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        make, arguments = maker
        run = make(*arguments)
        found: dict[str, Any] = {"ms": milliseconds(device, {name: run}, rounds)[name]}
        return found | {"peak_mib": peak_allocated_mib(device, run)} if memory else found

    row, failure = attempt(measure)
    torch._dynamo.reset()  # what it compiled holds the model
    free()
    return row or {"ms": math.nan, "failed": failure}


def against_transformers(shape: Shape, rounds: int) -> list[dict[str, object]]:
    """One row a variant: time, its ratio to compiled transformers, peak memory."""
    device, model = torch.device(shape.device), plain(shape)
    steps = {"ours": ours, "transformers": transformers_llama}
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: there is nothing to compare with")
        del steps["transformers"]
    makers: dict[str, Maker] = {
        f"{name} {'compiled' if compiled else 'eager'}": (step, (model, shape, compiled))
        for name, step in steps.items()
        for compiled in (False, True)
    }
    found = measured(device, makers, rounds, memory=True)
    rival = found.get("transformers compiled", {"ms": math.nan})["ms"]
    return [{"variant": name, **row, "time_over_compiled_transformers": row["ms"] / rival} for name, row in found.items()]


def cost_of_axes(shape: Shape, rounds: int) -> list[dict[str, object]]:
    """One row an axis: its time over the plain model's, beside the ratio of their FLOPs; on a GPU the share of its peak."""
    models, device = axes(plain(shape), shape), torch.device(shape.device)
    sequences = {name: shape.sequences.get(name, shape.batch) for name in models}
    makers: dict[str, Maker] = {name: (ours, (model, shape, True, sequences[name])) for name, model in models.items()}
    found = measured(device, makers, rounds, memory=False)
    times = {name: row["ms"] for name, row in found.items()}
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None

    def flops(name: str) -> float:
        per_token = flops_per_token(resolve(Config(model=models[name])).model, (shape.length + 1) / 2)
        return per_token * sequences[name] * shape.length

    return [
        {
            "axis": name,
            "sequences": sequences[name],
            **found[name],
            "time_ratio": times[name] / times["plain"],
            "flops_ratio": flops(name) / flops("plain"),
            "over_prediction": times[name] / times["plain"] * flops("plain") / flops(name),
            "tflops_per_s": flops(name) / times[name] / 1e9,
            "mfu": None if peak is None else flops(name) / times[name] * 1e3 / peak,
        }
        for name in models
    ]


def main(arguments: list[str]) -> None:
    """Measure and store both tables."""
    parser = argparse.ArgumentParser("python -m benchmarks step", description=__doc__)
    Shape.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    torch._dynamo.config.recompile_limit = 64
    shape = Shape.of(given)
    choose_device(0, 1)  # threads and allocator as runs have them
    name = f"step-{shape.precision}" if shape.device == "cpu" else f"step-{shape.precision}-{shape.device}"
    tables: dict[str, list[dict[str, object]]] = {}
    for table in (cost_of_axes, against_transformers):
        tables[table.__name__] = table(shape, given.rounds)
        print_table(tables[table.__name__])
        path = write_result(name, ["step", *arguments], tables)  # after each, in case the time runs out
    print("stored in", path)
    if failed := [str(row) for rows in tables.values() for row in rows if "failed" in row]:
        sys.exit("\n".join(failed))
