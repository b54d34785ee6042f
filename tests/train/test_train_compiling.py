"""torch.compile in training: every layer is one graph, whatever gradients there are already."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from megascale.train.build import cast
from megascale.train.compiling import compile_layers
from tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # graphs are the same, and quickly made
    torch._dynamo.reset()


def trained(precision: str) -> Decoder:
    """With fp32 gradients that were there before anything ran, as the engines have them."""
    decoder = Decoder(tiny_model(streams={"count": 2, "prefix_tokens": 3}))
    initialize(decoder, decoder.config, 1)
    cast(dict(decoder.named_parameters()), precision)
    for parameter in decoder.parameters():
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    return decoder


def differentiate(decoder: Decoder) -> None:
    tokens = torch.arange(32).view(2, 16) % 11
    documents = torch.zeros(2, 16, dtype=torch.int32)
    losses = decoder.losses(tokens, torch.arange(16).expand(2, -1), documents, tokens, torch.tensor(1 / 32))
    assert losses.lm is not None
    losses.lm.backward()


def test_bf16_layers_with_fp32_gradients_are_whole_graphs_that_add_to_them() -> None:
    eager, compiled = trained("bf16"), trained("bf16")
    differentiate(eager)
    compile_layers([compiled], "on", CPU, print)
    torch._dynamo.utils.counters.clear()
    places = {name: parameter.grad.data_ptr() for name, parameter in compiled.named_parameters() if parameter.grad is not None}
    differentiate(compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
    for (name, parameter), other in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == places[name], "a gradient went elsewhere"
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0.02, atol=0.02)


def test_without_a_compiler_a_run_says_so_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    said: list[str] = []
    compile_layers([trained("fp32")], "auto", CPU, said.append)
    assert said == ["training eagerly: no C++ compiler (g++ or clang++) is on the PATH"]
    with pytest.raises(Exception, match=r"(?s)no C\+\+ compiler.*compile=off"):
        compile_layers([trained("fp32")], "on", CPU, said.append)
