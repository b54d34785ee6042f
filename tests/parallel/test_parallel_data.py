"""Data parallelism: any number of ranks trains the run of one process, and a checkpoint belongs to no layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.load import CheckpointReader
from megascale.config.schema import Config, Parallel
from megascale.parallel.apply import apply
from megascale.parallel.mesh import open_mesh
from megascale.train.build import Parts
from ranks import RankPool
from runs import ALL_AXES, Run, losses, one_process, tiny_config
from tiny import packed_batch, tiny_decoder, tiny_model

SPOILED = "layers.1.attention.v.weight"
ADAMW = ("optimizer={lr: 0.003, eps: 1e-5}",)
# With an epsilon far above the moments and no memory, AdamW's update is the gradient times lr / eps.
SGD_LIKE = ("optimizer={lr: 100, eps: 1000, betas: [0, 0], weight_decay: 0, clip: null}",)


def spoil(parts: Parts) -> None:
    """What a wrong reduction would do: one tensor's gradient 1 % too large on one rank."""
    if parts.mesh.world.rank == parts.mesh.world.size - 1:
        parts.engine.parameters[SPOILED].register_hook(lambda gradient: gradient * 1.01)


def train_on_rank(
    rank: int, size: int, settings: dict[str, Any], spoiled: bool
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    run = Run(Config.model_validate(settings), one_process(rank, size), spoil if spoiled else None)
    assert run.train() == "done"
    return losses(run.records), run.weights


def start_of(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in tiny_decoder(Config.model_validate(settings).model, seed=1).named_parameters()}


Result = tuple[list[list[float]], dict[str, torch.Tensor]]


def train(ranks: RankPool, folder: Path, corpus: Path, size: int, *overrides: str, spoiled: bool = False) -> Result:
    name = f"run.name=ranks-{size}{'-spoiled' * spoiled}"
    config = tiny_config(
        folder, corpus, "schedule.steps=20", "batch={sequences: 8, micro_batches: 2}", name, *ALL_AXES, *overrides
    )
    results = ranks.run(train_on_rank, config.model_dump(), spoiled, world_size=size)
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert all(torch.equal(weight, other[1][n]) for n, weight in results[0][1].items())
    return results[0]


def problems(found: Result, reference: Result, start: dict[str, torch.Tensor]) -> list[str]:
    """Losses and gradient norms within 1e-5, weights within a thousandth of the way they went; what is not."""
    pairs = list(zip(found[0], reference[0], strict=True))
    wrong = [f"step {i}: {a} != {b}" for i, (a, b) in enumerate(pairs, 1) if a != pytest.approx(b, rel=1e-5)]
    for name, weight in reference[1].items():
        way = (weight - start[name]).norm()
        if (found[1][name] - weight).norm() > 1e-3 * way:
            wrong.append(name)
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [ADAMW, SGD_LIKE], ids=["adamw", "sgd"])
def test_any_number_of_ranks_trains_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, optimizer: tuple[str, ...]
) -> None:
    one = train(ranks, tmp_path, tiny_corpus, 1, *optimizer)
    assert one[0][-1][0] < one[0][0][0]
    config = tiny_config(tmp_path, tiny_corpus, *ALL_AXES)
    model = config.model.model_copy(update={"vocab_size": one[1]["embedding.weight"].shape[0]})
    start = start_of(config.model_copy(update={"model": model}).model_dump())
    for size in (2, 4):
        assert problems(train(ranks, tmp_path, tiny_corpus, size, *optimizer), one, start) == []
    # The comparison has teeth: one tensor's gradient off by 1 % on one of two ranks is found, by its name too.
    found = problems(train(ranks, tmp_path, tiny_corpus, 2, *optimizer, spoiled=True), one, start)
    assert any(line.startswith("step") for line in found)
    assert SPOILED in found


def counts_of_a_share(rank: int, size: int, scope: str) -> dict[str, torch.Tensor]:
    """The routers' report of this rank's texts of one micro-batch, summed over ranks."""
    model = tiny_model(streams={"count": 2, "prefix_tokens": 4}, experts={"count": 4, "per_token": 2, "scope": scope})
    decoder, batch = tiny_decoder(model, spread=0.1), packed_batch([[7, 5], [12], [3, 9], [6, 6]])
    apply(decoder, model, open_mesh(Parallel(), model, one_process(rank, size)))
    share = slice(rank * 4 // size, (rank + 1) * 4 // size)
    _, _, reports = decoder.hidden(*(x[share] for x in batch.inputs))
    world = one_process(rank, size)
    return {name: world.sum(value.detach().clone()) for name, value in reports.items()}


def test_the_routing_population_is_the_global_micro_batch(ranks: RankPool) -> None:
    (one,) = ranks.run(counts_of_a_share, "global", world_size=1)
    for size in (2, 4):
        for found in ranks.run(counts_of_a_share, "global", world_size=size):
            for name, value in one.items():
                torch.testing.assert_close(found[name], value)


def test_with_scope_rank_every_rank_counts_its_own(ranks: RankPool) -> None:
    (one,) = ranks.run(counts_of_a_share, "rank", world_size=1)
    two, _ = ranks.run(counts_of_a_share, "rank", world_size=2)
    assert torch.equal(two["moe/layer_00/load"], one["moe/layer_00/load"])
    # the mean of two products is not the product of two means, and each rank divides by its own number of tokens
    assert abs(two["balance"] / 2 - one["balance"]) > 1e-3
    torch.testing.assert_close(two["router_z"] / 2, one["router_z"])


def state_after(rank: int, size: int, settings: dict[str, Any], stop: bool) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of this rank's part; trains one step first if asked to."""
    run = Run(Config.model_validate(settings), one_process(rank, size))
    if stop:
        run.stop.level = run.stop.STOP
        assert run.train() == "stop"
    assert run.trainer.progress.step == 1
    return {f"{r.name}@{r.offsets}": r.tensor.clone() for r in run.trainer.engine.rectangles()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ranks_save_together_and_any_number_of_them_resumes(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, optimizer: str
) -> None:
    config = tiny_config(tmp_path, tiny_corpus, "batch.sequences=12", f"optimizer.name={optimizer}", "precision=bf16", *ALL_AXES)
    saved: dict[str, torch.Tensor] = {}
    for part in ranks.run(state_after, config.model_dump(), True, world_size=2):
        assert not saved.keys() & part.keys()
        saved |= part
    reader = CheckpointReader(tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000001")
    assert {name.split("@")[0] for name in saved} == set(reader.names())
    for size in (1, 3):
        loaded: dict[str, torch.Tensor] = {}
        for part in ranks.run(state_after, config.model_dump(), False, world_size=size):
            loaded |= part
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
