"""The plain engine against a straightforward torch loop, and what it may never change."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from megascale.checkpoint.load import CheckpointReader
from megascale.config.schema import Config
from megascale.model.decoder import Decoder
from megascale.model.initialize import initialize
from megascale.parallel.plain import allow_fp32_gradient
from megascale.train.batch_stream import step_batches
from megascale.train.build import Parts, cast
from megascale.train.schedule import lr_scale
from runs import ALL_AXES, Run, build_parts, tiny_config, train_tiny
from tiny import tiny_model

NO_CLIP = "optimizer.clip=null"


def straightforward(config: Config, parts: Parts) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training by hand: mean loss, autograd, clip_grad_norm_, torch.optim.AdamW. Weights and gradient norms."""
    decoder, norms = copy.deepcopy(parts.stages.modules()[0]), []
    own = dict(decoder.named_parameters())
    for parameter in own.values():
        parameter.grad = None
    peaks = [group.lr for group in parts.engine.groups]
    options = [
        {"params": [own[name] for name in g.parameters], "lr": g.lr, "weight_decay": g.weight_decay} for g in parts.engine.groups
    ]
    optimizer = torch.optim.AdamW(options, betas=config.optimizer.betas, eps=config.optimizer.eps)
    for batch in step_batches(parts.data.train, config.batch, 1, config.schedule.steps, 0, 1):
        (micro,) = batch.micro_batches
        logits = decoder(micro.tokens, micro.positions, micro.documents)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro.labels.flatten(), ignore_index=-100).backward()
        clip = config.optimizer.clip or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), clip).item())
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_scale(batch.step, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in own.items()}, norms


@pytest.mark.parametrize("clip", ["null", "0.5"])
def test_training_is_the_plain_loop_with_adamw(tmp_path: Path, tiny_corpus: Path, clip: str) -> None:
    config = tiny_config(tmp_path, tiny_corpus, f"optimizer.clip={clip}", "optimizer.eps=1e-5", "model.streams={count: 2}")
    weights, norms = straightforward(config, build_parts(config))
    run = train_tiny(config)
    assert [record["train/grad_norm"] for record in run.records] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.5
    start = build_parts(config).engine.masters
    for name, weight in run.weights.items():
        moved = (weights[name] - start[name]).norm()
        assert (weight - weights[name]).norm() <= 1e-3 * moved, name


def test_micro_batches_sum_up_to_the_whole_batch(tmp_path: Path, tiny_corpus: Path) -> None:
    runs = []
    for micro_batches in (1, 4):
        overrides = (f"batch.micro_batches={micro_batches}", f"run.name=micro-{micro_batches}", "optimizer.eps=1e-5")
        runs.append(train_tiny(tiny_config(tmp_path, tiny_corpus, *overrides)))
    for whole, cut in zip(runs[0].records, runs[1].records, strict=True):
        for name in ("train/lm_loss", "train/grad_norm"):
            assert cut[name] == pytest.approx(whole[name], rel=1e-5)
        assert cut["tokens"] == whole["tokens"]


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(tmp_path: Path, tiny_corpus: Path) -> None:
    engine = build_parts(tiny_config(tmp_path, tiny_corpus, "optimizer.clip=0.25")).engine
    (flat,) = engine.flats.values()
    seen: list[float] = []
    engine.optimizers[0].register_step_pre_hook(lambda *_: seen.append(flat.norm().item()))
    for size in (4.0, 0.125):
        flat.fill_(size / flat.numel() ** 0.5)
        assert engine.gradient_norm() == pytest.approx(size, rel=1e-4)
        engine.step(1.0)
        assert not flat.any()
    assert seen == pytest.approx([0.25, 0.125], rel=1e-4)


def test_muon_turns_every_expert_matrix_by_itself(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(
        tmp_path, tiny_corpus, "optimizer.name=muon", NO_CLIP, "model.experts={count: 4, per_token: 2, width: 16}"
    )
    engine = build_parts(config).engine
    name = "layers.0.feed_forward.up"
    before = engine.masters[name].detach().clone()
    torch.manual_seed(0)
    gradient = torch.randn(before.shape)
    gradient[1] *= 1000  # would dwarf the others in one joint matrix
    engine.trained[name].grad.copy_(gradient)
    engine.gradient_norm()
    engine.step(1.0)
    group = next(group for group in engine.groups if name in group.parameters)
    for e in range(4):
        alone = torch.nn.Parameter(before[e].clone())
        alone.grad = gradient[e].clone()
        torch.optim.Muon([alone], lr=group.lr, weight_decay=group.weight_decay, momentum=0.95, ns_steps=5).step()
        torch.testing.assert_close(engine.masters[name][e], alone.detach())
        assert not torch.equal(alone, before[e])


def test_masters_keep_what_bf16_cannot_show(tmp_path: Path, tiny_corpus: Path) -> None:
    overrides = ("precision=bf16", "optimizer.lr=1e-6", "optimizer.weight_decay=0", "schedule.warmup_steps=0", *ALL_AXES)
    config = tiny_config(tmp_path, tiny_corpus, *overrides)
    start = {name: p.detach().clone() for name, p in build_parts(config).engine.masters.items()}
    run = train_tiny(config)
    engine = run.trainer.engine
    narrow = [name for name, p in engine.parameters.items() if p.dtype == torch.bfloat16]
    unchanged = 0
    for name in narrow:
        master, parameter = engine.masters[name], engine.parameters[name]
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.to(torch.bfloat16)), name
        unchanged += int((parameter == start[name].to(torch.bfloat16)).sum())
    assert not torch.equal(engine.masters["layers.0.attention.q.weight"], start["layers.0.attention.q.weight"])
    assert unchanged > 0.9 * sum(engine.parameters[name].numel() for name in narrow)
    wide = {name for name, p in engine.parameters.items() if p.dtype == torch.float32}
    assert {"norm.weight", "layers.0.feed_forward.router.weight", "layers.1.residual.predict"} <= wide
    assert not any(name.endswith(("q.weight", "prefix_k", "feed_forward.up")) for name in wide)


def uses(loss: torch.Tensor) -> Counter[int]:
    """How many contributions to its gradient each leaf gets in one backward pass, by its id."""
    found: Counter[int] = Counter()
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        for following, _ in () if node is None else node.next_functions:
            if hasattr(following, "variable"):
                found[id(following.variable)] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


@pytest.mark.parametrize(
    "model",
    [
        {"streams": {"count": 2, "prefix_tokens": 3}, "experts": {"count": 4, "width": 16, "shared": 1}, "altup": {"blocks": 2}},
        {"streams": {"count": 2, "prefix_tokens": 3, "reparameterise": 8}},
        {"altup": {"form": "sequence", "stride": 2}},
        {"tie_embeddings": True},
    ],
    ids=["P E K", "prefix networks", "every second token", "tied"],
)
def test_a_bf16_weight_is_used_once_or_summed_in_fp32(model: dict) -> None:
    """Autograd sums the contributions to a leaf before it adds them to its gradient, in their own dtype unless it is told another."""
    decoder = Decoder(tiny_model(**model))
    initialize(decoder, decoder.config, 1)
    named = dict(decoder.named_parameters())
    cast(named, "bf16")
    for name, parameter in named.items():
        allow_fp32_gradient(name, parameter)
    tokens, documents = torch.arange(32).view(2, 16) % 11, torch.zeros(2, 16, dtype=torch.int32)
    losses = decoder.losses(tokens, torch.arange(16).expand(2, -1), documents, tokens, torch.tensor(1 / 32))
    assert losses.lm is not None
    found = uses(sum(losses.auxiliary.values(), losses.lm))
    assert found
    often = {name for name, parameter in named.items() if found[id(parameter)] > 1}
    assert all(named[name].grad_dtype == torch.float32 for name in often)
    assert ("embedding.weight" in often) == decoder.config.tie_embeddings


def test_gradients_of_streams_one_after_the_other_are_summed_in_fp32(tmp_path: Path, tiny_corpus: Path) -> None:
    parts = build_parts(tiny_config(tmp_path, tiny_corpus, "precision=bf16", *ALL_AXES, "parallel={recompute: stream}"))
    narrow = [p for p in parts.engine.parameters.values() if p.dtype == torch.bfloat16]
    assert narrow and all(p.grad_dtype == torch.float32 for p in narrow)


def test_bf16_trains_like_fp32(tmp_path: Path, tiny_corpus: Path) -> None:
    found = [
        train_tiny(tiny_config(tmp_path, tiny_corpus, f"precision={precision}", f"run.name={precision}", *ALL_AXES)).records[-1]
        for precision in ("fp32", "bf16")
    ]
    assert found[1]["train/lm_loss"] == pytest.approx(found[0]["train/lm_loss"], rel=1e-2)


def test_frozen_parameters_stay_and_are_saved(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus, "optimizer.groups=[{pattern: layers.0.*, frozen: true}]")
    start = {name: p.detach().clone() for name, p in build_parts(config).engine.masters.items()}
    run = train_tiny(config)
    for name, weight in run.weights.items():
        assert torch.equal(weight, start[name]) == name.startswith("layers.0."), name
    saved = set(CheckpointReader(run.trainer.checkpoints / "step-00000006").names())
    assert {f"model/{name}" for name in start} <= saved
    assert not any(name.startswith("adamw.") and "/layers.0." in name for name in saved)


def spoil(*steps: int):
    """Makes the gradients of these steps not a number."""

    def change(parts: Parts) -> None:
        engine, calls = parts.engine, iter(range(1, 100))
        backward = engine.backward
        engine.backward = lambda loss, last: backward(loss * (math.nan if next(calls) in steps else 1.0), last)  # type: ignore[method-assign]

    return change


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus)
    run = Run(config, change=spoil(3))
    engine, states = run.trainer.engine, []
    original = engine.skip

    def watched() -> None:
        before = {r.name: r.tensor.clone() for r in engine.rectangles()}
        original()
        after = {r.name: r.tensor for r in engine.rectangles()}
        states.append(before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before))
        states.append(any(name.startswith("adamw.exp_avg/") for name in before))

    engine.skip = watched  # type: ignore[method-assign]
    assert run.train() == "done"
    assert states == [True, True]
    assert [record["guard/skipped_steps"] for record in run.records] == [0, 0, 1, 1, 1, 1]
    assert math.isnan(float(run.records[2]["train/grad_norm"]))
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())


def test_several_bad_steps_in_a_row_stop_the_run(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tiny_config(tmp_path, tiny_corpus, "guard.nonfinite_in_a_row=2")
    assert Run(config, change=spoil(2, 4)).train() == "done"
    with pytest.raises(RuntimeError, match="step 5: the gradient norm was nan for 2 steps in a row; lower optimizer.lr"):
        train_tiny(tiny_config(tmp_path, tiny_corpus, "guard.nonfinite_in_a_row=2", "run.name=bad"), spoil(2, 4, 5))
