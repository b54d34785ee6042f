"""A quiet start of streams on a trained trunk: keys that queries turn away from, the same in every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layouts import saved
from megascale.model.attention import Attention, pack
from megascale.train.build import Parts
from megascale.train.quiet import RIDGE, _keys, least_attended_key, quiet_prefixes
from ranks import RankPool
from runs import Run, build_parts, tiny_config, train_phases_on_rank, train_tiny

PHASES = "schedule={phases: [{steps: 3, streams: 1, shape: constant}, {steps: 3, shape: constant}]}"
SETTINGS = (
    "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64, qkv_bias: true}",
    "model.streams={count: 2, prefix_tokens: 4, prefix_start: quiet}",
    "optimizer={lr: 0.01, eps: 1e-5}",
    PHASES,
    "batch={sequences: 8, micro_batches: 2}",
)


@settings(max_examples=15)
@given(seed=st.integers(0, 99), width=st.sampled_from([2, 5, 8]))
def test_no_other_key_takes_less_from_gaussian_queries(seed: int, width: int) -> None:
    """log E[exp(q k / sqrt(D))] = m k / sqrt(D) + k C k / 2D is convex: at its least the gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(500, width, generator=generator).double() + torch.randn(width, generator=generator).double()
    rows = torch.cat([torch.ones(500, 1).double(), queries], 1)
    (key,) = least_attended_key((rows.T @ rows)[None])
    covariance = torch.cov(queries.T, correction=0)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(width).double()
    torch.testing.assert_close(queries.mean(0) / math.sqrt(width), -covariance @ key / width)
    assert float((queries @ key / math.sqrt(width)).exp().mean()) < 1


def mean_factor(parts: Parts) -> list[float]:
    """Mean of exp(score) of each layer's prefix slots over the queries of a batch; 1 where scores are 0."""
    batch = parts.data.train.sequences(range(4))
    (decoder,) = parts.stages.modules()
    found = []

    def score(attention: Attention, inputs: tuple, output: torch.Tensor) -> None:
        packing = pack(batch.positions, batch.documents, decoder.config)
        q = attention.project(inputs[0], packing.cos, packing.sin)[0]
        keys, _ = attention.prefixes()
        q = q.view(q.shape[0], inputs[0].shape[1], keys.shape[1], -1, q.shape[-1]).expand(-1, len(keys), -1, -1, -1)
        found.append(float((torch.einsum("tpghd,pgnd->tpghn", q, keys) / math.sqrt(q.shape[-1])).exp().mean()))

    hooks = [layer.attention.register_forward_hook(score) for layer in decoder.layers.values()]
    parts.stages.evaluate(batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("network", [(), ("model.streams.reparameterise=6",)], ids=["prefixes", "network"])
def test_prefixes_take_less_than_by_chance_and_still_differ(tmp_path: Path, tiny_corpus: Path, network: tuple[str, ...]) -> None:
    parts = build_parts(tiny_config(tmp_path, tiny_corpus, *SETTINGS[:2], *network))
    with torch.no_grad():
        for name, parameter in parts.engine.parameters.items():
            if name.endswith("attention.q.bias"):  # as trained trunks have it: queries with a mean
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            elif ".q.weight" in name:
                parameter.mul_(5)
    before = mean_factor(parts)
    assert all(factor == pytest.approx(1, abs=0.05) for factor in before)
    quiet_prefixes(parts, 1)
    assert max(mean_factor(parts)) < 0.3
    for layer in parts.stages.modules()[0].layers.values():
        keys, values = layer.attention.prefixes()
        assert (keys[0] != keys[1]).any()
        assert not values.any()
        assert layer.attention.project.__func__ is Attention.project  # nothing stays behind


def test_compiled_layers_are_observed(tmp_path: Path, tiny_corpus: Path) -> None:
    expected, found = (
        _keys(build_parts(tiny_config(tmp_path, tiny_corpus, *SETTINGS[:2], f"compile={on}")), 1) for on in ("off", "on")
    )
    assert expected.keys() == found.keys() == {0, 1, 2, 3}
    for layer, key in expected.items():
        torch.testing.assert_close(found[layer], key, rtol=1e-3, atol=1e-4)


def test_a_resume_at_the_border_changes_no_bit(tmp_path: Path, tiny_corpus: Path) -> None:
    whole, halves = (tiny_config(tmp_path, tiny_corpus, *SETTINGS, f"run.name={name}") for name in ("whole", "halves"))
    train_phases_on_rank(0, 1, whole.model_dump())
    train_phases_on_rank(0, 1, halves.model_dump(), 3)
    train_phases_on_rank(0, 1, halves.model_dump())
    one, two = (saved(tmp_path / "runs" / name / "checkpoints" / "step-00000006") for name in ("whole", "halves"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (4, "tp: 2, zero_stage: 0"),
        (4, "tp: 4, zero_stage: 1"),
        (4, "pp: 2, zero_stage: 1"),
        (2, "zero_stage: 2"),
        (2, "zero_stage: 3"),
        (2, "pp: 2, schedule: interleaved, virtual_stages: 2, zero_stage: 0, recompute: stream"),
    ],
    ids=lambda x: str(x),
)
def test_it_is_the_start_of_one_process(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, world: int, parallel: str) -> None:
    alone = train_phases_on_rank(0, 1, tiny_config(tmp_path, tiny_corpus, *SETTINGS, "run.name=alone").model_dump())
    config = tiny_config(tmp_path, tiny_corpus, *SETTINGS, "parallel={" + parallel + "}")
    found = ranks.run(train_phases_on_rank, config.model_dump(), world_size=world)[0]
    for name in ("train/lm_loss", "train/grad_norm"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in alone], rel=1e-5)
    one, other = (saved(tmp_path / "runs" / name / "checkpoints" / "step-00000006", "model/") for name in ("alone", "tiny"))
    for name, weight in one.items():
        if name.endswith("prefix_k"):  # fitted, then trained for three steps
            torch.testing.assert_close(other[name], weight, rtol=1e-2, atol=2e-3)


def test_streams_of_a_run_that_starts_from_another_start_quietly_too(tmp_path: Path, tiny_corpus: Path) -> None:
    shape = SETTINGS[0]
    trunk = train_tiny(tiny_config(tmp_path, tiny_corpus, shape, "run.name=trunk"))
    keys = []
    for start in ("normal", "quiet"):
        streams = f"model.streams={{count: 2, prefix_tokens: 4, prefix_start: {start}}}"
        run = Run(tiny_config(tmp_path, tiny_corpus, shape, streams, f"run.name={start}", f"start.model={trunk.folder}"))
        keys.append(run.weights["layers.0.attention.prefix_k"])
        assert torch.equal(run.weights["layers.0.attention.q.weight"], trunk.weights["layers.0.attention.q.weight"])
    # one key was added to every slot of every stream
    torch.testing.assert_close((keys[1] - keys[0]).var((0, 2)), torch.zeros(2, 8), rtol=0, atol=1e-10)
    assert (keys[1] - keys[0]).abs().max() > 0.01
