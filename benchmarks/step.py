"""Time and memory of forward + backward: our plain decoder against transformers' Llama, and each axis against what its FLOPs predict.

`python -m benchmarks step`. The optimizer is left out: both sides would use torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import interleaved, peak_memory_mib, print_table, write_result
from megascale.config.resolve import resolve
from megascale.config.schema import AltUp, Config, Experts, Model, Streams
from megascale.model.accounting import flops_per_token
from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from megascale.model.loss import LossKernels
from megascale.train.build import cast

VOCABULARY = 4096


def plain(width: int, layers: int) -> Model:
    """The dense decoder that everything is compared with."""
    return Model(vocab_size=VOCABULARY, width=width, layers=layers, heads=width // 64)


def axes(model: Model) -> dict[str, Model]:
    """The plain model and one with each axis, and with all."""
    streams, altup = Streams(count=2, prefix_tokens=48), AltUp(blocks=2)
    experts = Experts(count=8, width=resolve(Config(model=model)).model.ffn_width)
    return {
        "plain": model,
        "P=2": model.model_copy(update={"streams": streams}),
        "E=8": model.model_copy(update={"experts": experts}),
        "K=2": model.model_copy(update={"altup": altup}),
        "P=2 E=8 K=2": model.model_copy(update={"streams": streams, "experts": experts, "altup": altup}),
    }


def ours(model: Model, batch: int, length: int, precision: str, compiled: bool) -> Callable[[], None]:
    """A function that runs one forward and backward pass of our decoder."""
    model = resolve(Config(model=model)).model
    decoder = Decoder(model)
    initialize(decoder, model, 1)
    cast(dict(decoder.named_parameters()), precision)
    if compiled:
        for layer in decoder.layers.values():
            layer.compile()
        LossKernels.compile()
    tokens, positions = torch.randint(VOCABULARY, (batch, length)), torch.arange(length).expand(batch, -1)
    documents, scale = torch.zeros(batch, length, dtype=torch.int32), torch.tensor(1 / (batch * length))

    def run() -> None:
        decoder.zero_grad(set_to_none=True)
        losses = decoder.losses(tokens, positions, documents, tokens, scale)
        assert losses.lm is not None
        sum(losses.auxiliary.values(), losses.lm).backward()

    return run


def transformers_llama(model: Model, batch: int, length: int, precision: str, compiled: bool) -> Callable[[], None]:
    """The same for transformers' LlamaForCausalLM of the same shape (SDPA attention), with the loss it would train with."""
    import transformers

    LlamaConfig, LlamaForCausalLM = (getattr(transformers, name) for name in ("LlamaConfig", "LlamaForCausalLM"))  # untyped
    model = resolve(Config(model=model)).model
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=model.width, num_hidden_layers=model.layers, num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads, intermediate_size=model.ffn_width, attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    if precision == "bf16":
        llama = llama.to(torch.bfloat16)
    forward = torch.compile(llama) if compiled else llama
    tokens = torch.randint(VOCABULARY, (batch, length))

    def run() -> None:
        llama.zero_grad(set_to_none=True)
        logits = forward(tokens).logits
        F.cross_entropy(logits.float().view(-1, VOCABULARY), tokens.flatten()).backward()

    return run


def _run_twice(maker: Callable[..., Callable[[], None]], *arguments: object) -> None:
    run = maker(*arguments)
    run()
    run()


def against_transformers(model: Model, batch: int, length: int, precision: str, rounds: int) -> list[dict[str, object]]:
    """One row a variant: best and median time, ratio to compiled transformers, peak memory."""
    makers = {"ours": ours, "transformers": transformers_llama}
    arguments = {(name, compiled): (model, batch, length, precision, compiled) for name in makers for compiled in (False, True)}
    runs = {key: makers[key[0]](*values) for key, values in arguments.items()}
    labels = {f"{name} {'compiled' if compiled else 'eager'}": (name, compiled) for name, compiled in runs}
    times = interleaved({label: runs[key] for label, key in labels.items()}, rounds)
    reference = times["transformers compiled"]
    rows = []
    for label, key in labels.items():
        memory = peak_memory_mib(_run_twice, makers[key[0]], *arguments[key])
        ratio = times[label]["median_s"] / reference["median_s"]
        rows.append({"variant": label, **times[label], "time_over_compiled_transformers": ratio, "peak_mib": memory})
    return rows


def cost_of_axes(model: Model, batch: int, length: int, precision: str, rounds: int) -> list[dict[str, object]]:
    """One row an axis: its time over the plain model's, beside the ratio of their FLOPs."""
    models = axes(model)
    times = interleaved({name: ours(m, batch, length, precision, True) for name, m in models.items()}, rounds)

    def flops(m: Model) -> float:
        return flops_per_token(resolve(Config(model=m)).model, (length + 1) / 2)

    rows = []
    for name, m in models.items():
        measured, predicted = times[name]["best_s"] / times["plain"]["best_s"], flops(m) / flops(models["plain"])
        rows.append(
            {
                "axis": name,
                **times[name],
                "time_ratio": measured,
                "flops_ratio": predicted,
                "over_prediction": measured / predicted,
            }
        )
    return rows


def main(arguments: list[str]) -> None:
    """Measure and store both tables."""
    parser = argparse.ArgumentParser("python -m benchmarks step", description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    torch._dynamo.config.recompile_limit = 64
    model, rest = plain(given.width, given.layers), (given.batch, given.length, given.precision, given.rounds)
    tables = {"against_transformers": against_transformers(model, *rest), "cost_of_axes": cost_of_axes(model, *rest)}
    for rows in tables.values():
        print_table(rows)
    print(
        "stored in", write_result(f"step-{given.precision}", f"python -m benchmarks step {' '.join(arguments)}".strip(), tables)
    )
