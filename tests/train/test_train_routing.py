"""Routers over a whole run: biases that move once a step, tables that balance the corpus, what is recorded, and runs opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megascale.data.batches import SequenceSet
from megascale.data.blend import Blend, BlendedSource
from megascale.data.corpus import Split
from megascale.model.routers import ROUTERS
from megascale.observe.metrics import check_record
from megascale.train import unigrams
from megascale.train.build import Parts
from megascale.train.load_run import load_run
from megascale.train.unigrams import unigram_counts
from runs import Run, tiny_config, train_tiny

AXES = ("model.streams={count: 2, prefix_tokens: 4}", "batch={sequences: 4, micro_batches: 2}", "schedule.steps=3")


def experts(router: str, **settings: Any) -> str:
    more = "".join(f", {name}: {value}" for name, value in settings.items())
    return f"model.experts={{count: 4, per_token: 2, width: 16, router: {router}{more}}}"


def biases(run: Run) -> dict[str, Tensor]:
    (decoder,) = run.trainer.stages.modules()
    return {name: layer.feed_forward.router.bias.clone() for name, layer in decoder.layers.items()}


def test_biases_move_once_a_step_by_the_loads_of_all_its_micro_batches(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus, *AXES, experts("sigmoid", bias_rate=0.01))
    run, loads = Run(config), dict[str, list[Tensor]]()
    (decoder,) = run.trainer.stages.modules()
    for name, layer in decoder.layers.items():
        seen = loads.setdefault(name, [])
        layer.feed_forward.router.register_forward_hook(
            lambda _, __, found, seen=seen: seen.append(torch.bincount(found[1].flatten(), minlength=4))
        )
    run.train()
    for name, bias in biases(run).items():
        expected = torch.zeros(4)
        assert len(loads[name]) == 6
        for step in range(3):
            load = loads[name][2 * step] + loads[name][2 * step + 1]
            assert load.sum() == 4 * 32 * 2 * 2
            expected += 0.01 * (load.sum() / 4 - load).sign()
            share = run.records[step][f"moe/layer_{int(name):02d}/load_max_over_mean"]
            assert share == pytest.approx(float(load.max() / load.float().mean()))
        torch.testing.assert_close(bias, expected)


def test_a_step_without_a_finite_gradient_moves_no_bias(tmp_path: Path, tiny_corpus: Path) -> None:
    def spoil(parts: Parts) -> None:
        parts.engine.parameters["norm.weight"].register_hook(lambda gradient: gradient * torch.nan)

    run = train_tiny(tiny_config(tmp_path, tiny_corpus, *AXES, experts("sigmoid")), change=spoil)
    assert run.records[-1]["guard/skipped_steps"] == 3
    assert not any(bias.any() for bias in biases(run).values())


@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_records_its_routers_metrics_and_opens_again(tmp_path: Path, tiny_corpus: Path, router: str) -> None:
    config = tiny_config(
        tmp_path, tiny_corpus, *AXES, experts(router, capacity_factor=0.9), "validation={every: 3, sequences: 8}"
    )
    run = train_tiny(config)
    for record in run.records:
        check_record(record)
        names = {name.split("/")[-1] for name in record if name.startswith("moe/layer_00/")}
        own = {"s_base": {"residual"}, "rl_r": {"policy_noise"}}.get(router, set())
        assert names == {"load_max_over_mean", "load_entropy", "idle_experts", "dropped_share"} | own
        assert 0 < record["moe/layer_00/dropped_share"] < 1
        auxiliary = sum(value for name, value in record.items() if name.startswith("train/aux/"))
        assert record["train/total_loss"] == pytest.approx(record["train/lm_loss"] + auxiliary)
    loaded = load_run(run.folder)
    (trained,) = run.trainer.stages.modules()
    for name, buffer in trained.named_buffers():
        assert torch.equal(loaded.decoder.get_buffer(name), buffer), name
    tokens = torch.arange(20)[None]
    arguments = tokens, tokens, torch.zeros_like(tokens)
    torch.testing.assert_close(loaded.decoder(*arguments), trained.eval()(*arguments))


def test_a_resumed_run_keeps_the_table_it_was_trained_with(tmp_path: Path, tiny_corpus: Path) -> None:
    """Whatever would be drawn now: corpora, and with them frequencies, may have changed."""

    def turn(parts: Parts) -> None:
        table = parts.stages.modules()[0].layers["0"].feed_forward.router.table
        table.copy_((table + 1) % 4)

    config = tiny_config(tmp_path, tiny_corpus, *AXES, experts("hash", hash_map="balanced"))
    first = train_tiny(config, change=turn)
    (decoder,) = first.trainer.stages.modules()
    (resumed,) = Run(config).trainer.stages.modules()
    table, drawn = decoder.layers["0"].feed_forward.router.table, resumed.layers["0"].feed_forward.router
    assert torch.equal(drawn.table, table)
    drawn.start(config.run.seed, 0)
    assert not torch.equal(drawn.table, table)


def test_balanced_tables_give_experts_even_shares_of_the_corpus(tmp_path: Path, tiny_corpus: Path) -> None:
    highest = {}
    for kind in ("balanced", "random"):
        settings = experts("hash", hash_map=kind), "model.experts.per_token=1", f"run.name={kind}"
        run = Run(tiny_config(tmp_path, tiny_corpus, *AXES, *settings))
        counts = unigram_counts(run.trainer.parts.data.train, run.trainer.config.model.vocab_size)
        (decoder,) = run.trainer.stages.modules()
        tables = [layer.feed_forward.router.table[:, 0].long() for layer in decoder.layers.values()]
        shares = [torch.zeros(4).double().index_add(0, table, counts) / counts.sum() for table in tables]
        highest[kind] = float(torch.stack(shares).max())
        assert not torch.equal(*tables)
    assert highest["balanced"] < max(0.26, 1.02 * float(counts.max() / counts.sum()))
    assert highest["random"] > highest["balanced"] + 0.01


def source(ids: np.ndarray, weight: float) -> BlendedSource:
    split = Split("x", ids, np.zeros(1, np.int64), None, len(ids), True)
    return BlendedSource(SequenceSet("x", split, 8, "causal", 10, False), weight, "digest")


def test_counts_are_shares_of_the_blend(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.array([1, 1, 1, 2] * 50), np.array([3] * 9000)
    counts = unigram_counts(Blend([source(first, 3.0), source(second, 1.0)], 0), 10)
    expected = torch.zeros(10).double()
    expected[[1, 2, 3]] = torch.tensor([0.75 * 0.75, 0.75 * 0.25, 0.25]).double()
    torch.testing.assert_close(counts / counts.sum(), expected)
    # of a long source evenly spread pieces
    monkeypatch.setattr(unigrams, "MOST_TOKENS", 400)
    monkeypatch.setattr(unigrams, "PIECE", 10)
    counts = unigram_counts(Blend([source(np.repeat(np.arange(10), 1000), 1.0)], 0), 10)
    assert (counts / counts.sum() - 0.1).abs().max() < 0.03
