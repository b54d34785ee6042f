"""megascale generate: cached decoding is the model, choices belong to a seed, and what is asked for is what comes."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.cli import main
from megascale.commands import generate as verb
from megascale.config.errors import InputError
from megascale.config.schema import Config
from megascale.model.decoder import Decoder
from megascale.parallel.pipeline import Stages
from megascale.train.load_run import LoadedRun, load_run
from megascale.train.sampling import SamplingOptions, choose, generate
from megascale.train.team import whole
from runs import one_process
from tiny import tiny_decoder, tiny_model

GREEDY = SamplingOptions(tokens=20, temperature=0)
PLAIN: dict = {}
SCALED = {"streams": {"count": 2, "prefix_tokens": 3}, "experts": {"count": 4, "per_token": 2}, "altup": {"blocks": 2}}


def stages(decoder: Decoder) -> Stages:
    return whole(decoder, Config(model=decoder.config), one_process())


def recomputed(decoder: Decoder, text: list[int], context: int, tokens: int) -> list[int]:
    """Greedy continuation by a full forward pass over the visible text for every token."""
    seen, new = list(text), []
    for _ in range(tokens):
        if len(seen) > context:
            seen = seen[-(context // 2) :]
        tensor = torch.tensor([seen])
        positions = torch.arange(len(seen))[None]
        token = int(decoder(tensor, positions, torch.zeros_like(positions))[0, -1].argmax())
        seen.append(token)
        new.append(token)
    return new


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> LoadedRun:
    return load_run(tiny_run)


@pytest.mark.parametrize("model", [PLAIN, SCALED, {"sliding_window": 5}], ids=["plain", "scaled", "window"])
@pytest.mark.parametrize("context", [64, 12], ids=["inside the context", "sliding past it"])
def test_cached_greedy_decoding_equals_recomputation(model: dict, context: int) -> None:
    decoder = tiny_decoder(tiny_model(**model), spread=0.2)
    prompt = [5, 17, 3, 60, 2]
    cached = [step[0] for step in generate(stages(decoder), prompt, 1, context, None, GREEDY)]
    assert cached == recomputed(decoder, prompt, context, GREEDY.tokens)
    assert len(set(cached)) > 2, "a constant continuation would prove little"


def test_a_trained_run_decodes_as_it_computes(run: LoadedRun) -> None:
    prompt = run.encode("def alpha(")
    cached = [step[0] for step in generate(run.stages, prompt, 1, 32, None, SamplingOptions(tokens=8, temperature=0))]
    assert cached == recomputed(run.decoder, prompt, 32, 8)


def test_a_sample_depends_on_seed_and_number_only() -> None:
    decoder = tiny_decoder(tiny_model(**SCALED), spread=0.2)
    warm = SamplingOptions(tokens=12, temperature=1.5, seed=3)

    def draw(samples: int, options: SamplingOptions) -> list[tuple[int | None, ...]]:
        return list(zip(*generate(stages(decoder), [1, 2, 3], samples, 64, None, options), strict=True))

    three = draw(3, warm)
    assert draw(3, warm) == three
    assert draw(1, warm) == three[:1]
    assert len(set(three)) == 3
    assert draw(3, SamplingOptions(tokens=12, temperature=1.5, seed=4)) != three


def test_a_sample_ends_at_the_separator_and_the_others_go_on() -> None:
    decoder = tiny_decoder(tiny_model(), spread=0.2)
    options = SamplingOptions(tokens=20, temperature=3.0)
    free = list(zip(*generate(stages(decoder), [1], 3, 64, None, options), strict=True))
    stop = free[0][4]
    stopped = list(zip(*generate(stages(decoder), [1], 3, 64, stop, options), strict=True))
    for without, with_stop in zip(free, stopped, strict=True):
        end = without.index(stop) if stop in without else len(without)
        assert with_stop[:end] == without[: len(with_stop)][:end]
        assert all(token is None for token in with_stop[end:])
    assert any(stop not in sample for sample in free), "some sample must go on"


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True), st.floats(0.1, 3))
def test_top_1_and_a_tiny_top_p_are_greedy(logits: list[float], draw: float, temperature: float) -> None:
    row = torch.tensor(logits)
    greedy = choose(row, SamplingOptions(temperature=0), draw)
    assert choose(row, SamplingOptions(temperature=temperature, top_k=1), draw) == greedy
    assert choose(row, SamplingOptions(temperature=temperature, top_p=1e-9), draw) == greedy


@settings(max_examples=5)
@given(st.floats(0.5, 2), st.sampled_from([None, 3]), st.sampled_from([1.0, 0.7]))
def test_choices_follow_the_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0, 0.5], dtype=torch.float64)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = (logits / temperature).softmax(0)
    if top_k is not None:
        expected[expected < expected.sort(descending=True).values[top_k - 1]] = 0
        expected /= expected.sum()
    if top_p < 1:
        ordered = expected.sort(descending=True).values
        smallest = ordered[int((ordered.cumsum(0) < top_p).sum())]
        expected[expected < smallest] = 0
        expected /= expected.sum()
    draws = 400
    counts = torch.bincount(torch.tensor([choose(logits, options, (i + 0.5) / draws) for i in range(draws)]), minlength=5)
    assert torch.allclose(counts.double() / draws, expected, atol=2 / draws)


def test_the_verb_prints_text_on_stdout_and_speed_on_stderr(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given_arguments = ["generate", str(tiny_run), "--prompt", "def é", "--tokens", "6"]
    assert main(given_arguments) == 0
    first = capsys.readouterr()
    assert first.out.startswith("def é")
    assert "tokens/s" in first.err
    assert main([*given_arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt"] + facts["samples"][0]["text"] == first.out[:-1]
    assert facts["step"] == 4


def test_a_prompt_from_stdin_longer_than_the_context_is_cut(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x = 1\n" * 50)))
    assert main(["generate", str(tiny_run), "--prompt-file", "-", "--tokens", "40", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt_tokens"] == 32
    assert len(facts["notes"]) == 2


@pytest.mark.parametrize(
    "option",
    [
        "--tokens=0",
        "--temperature=-1",
        "--top-k=0",
        "--top-p=0",
        "--top-p=1.5",
        "--samples=0",
        "--prompt-file=/nowhere",
        "--step=3",
    ],
)
def test_bad_options_are_named(option: str, tiny_run: Path) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    with pytest.raises(InputError, match=option.split("=")[0]):
        verb.run(parser.parse_args([str(tiny_run), option]))
