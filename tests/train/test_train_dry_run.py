"""A dry run says what a real run does: the same bytes on every axis, the same parameters; for every shipped model on hundreds of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from layouts import full_unless
from ledgers import ledger_of_a_step
from megascale.cli import main
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.model.accounting import parameters
from megascale.parallel.device import Device
from megascale.parallel.ledger import Entry
from megascale.parallel.mesh import STAGE, Layout, Mesh, make_layout
from megascale.parallel.shard import cut, named_parameters, own_stages, shard, whole_on_meta
from megascale.parallel.world import World
from megascale.train import dry_run as module
from megascale.train.dry_run import dry_run
from ranks import RankPool
from runs import ALL_AXES, tiny_config, write_config

MODELS = Path(__file__).parents[2] / "configs" / "models"
FOUR_LAYERS = ("model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}", *ALL_AXES)
BATCH = "batch={sequences: 16, micro_batches: 4}"
BY_ROUTING = ("ep", "etp")


def sent(entries: Sequence[Entry]) -> dict[tuple[str, str, int], Fraction]:
    return {(e.axis, e.kind, e.ranks): e.sent for e in entries if e.axis not in BY_ROUTING}


LAYOUTS = {
    "tp2-dp2": (4, "parallel={tp: 2, zero_stage: 0}", "precision=bf16"),
    "dp4": (4, "parallel={zero_stage: 0}"),
    "tp2-ep4-dp2": (4, "parallel={tp: 2, ep: 4, zero_stage: 0}"),
    "tp2-etp2-dp2": (4, "parallel={tp: 2, etp: 2, zero_stage: 0}", "precision=bf16"),
    "tp2-ep2-etp2-dp2": (4, "parallel={tp: 2, ep: 2, etp: 2, zero_stage: 0}", "model.experts.shared=1"),
    "tp2-ep2-etp2-rebuilt": (
        4,
        "parallel={tp: 2, ep: 2, etp: 2, zero_stage: 0, recompute: layer}",
        "model.layers=16",
        "model.altup={blocks: 8}",
    ),
    "tp4": (4, "parallel={tp: 4, zero_stage: 0}"),
    "pp2-tp2-ep2": (4, "parallel={pp: 2, tp: 2, ep: 2, zero_stage: 0}", "precision=bf16"),
    "pp2-tp2-dp2": (8, "parallel={pp: 2, tp: 2, ep: 4, zero_stage: 0}"),
    "wide blocks": (4, "parallel={pp: 2, tp: 2, zero_stage: 0}", "model.altup={blocks: 2, form: wide, coefficients: token}"),
    "rebuilt states": (
        4,
        "parallel={pp: 2, tp: 2, zero_stage: 0, recompute: layer}",
        "model.layers=16",
        "model.altup={blocks: 8}",
    ),
    "sequence": (4, "parallel={pp: 2, zero_stage: 0}", "model.altup={form: sequence}"),
    "pp2-interleaved": (
        4,
        "parallel={pp: 2, schedule: interleaved, virtual_stages: 2, zero_stage: 0}",
        "model.tie_embeddings=true",
    ),
    "stream2-cp2-tp2": (8, "parallel={stream: 2, cp: 2, tp: 2, zero_stage: 0}", "precision=bf16"),
    "ulysses": (4, "parallel={pp: 2, cp: 2, context: ulysses, zero_stage: 0}"),
    "pp2-zero_bubble": (4, "parallel={pp: 2, schedule: zero_bubble, virtual_stages: 2, zero_stage: 0}"),
    "pp2-zbv": (4, "parallel={pp: 2, schedule: zbv, zero_stage: 0}", "model.tie_embeddings=true"),
    "pp2-dualpipev": (2, "parallel={pp: 2, schedule: dualpipev, zero_stage: 0}"),
    "pp2-tp2-ep2-streams-apart": (4, "parallel={pp: 2, tp: 2, ep: 2, zero_stage: 0, recompute: stream}"),
}


QUICK = ("tp2-ep4-dp2", "tp2-ep2-etp2-dp2", "pp2-tp2-ep2", "stream2-cp2-tp2")


@pytest.mark.parametrize("layout", full_unless(QUICK, LAYOUTS))
def test_a_real_step_sends_what_the_dry_run_says(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, layout: str) -> None:
    world, *overrides = LAYOUTS[layout]
    settings = (*FOUR_LAYERS, BATCH, *overrides)
    real = ranks.run(ledger_of_a_step, tiny_config(tmp_path, tiny_corpus, *settings).model_dump(), world_size=world)
    found = dry_run(write_config(tmp_path, tiny_corpus), settings, world)
    for report in found.ranks:
        assert sent(report.sent) == sent(real[report.rank])
        assert {(e.axis, e.kind): e.calls for e in report.sent} == {(e.axis, e.kind): e.calls for e in real[report.rank]}
        # how many rows go from whom to whom depends on the routing, but not how many there are
        stage = found.layout.along(report.rank, *STAGE)
        for axis in BY_ROUTING:
            dry = sum(e.volume for e in report.sent if e.axis == axis) * len(stage)
            assert sum(e.volume for rank in stage for e in real[rank] if e.axis == axis) == dry


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    ["{zero_stage: 1, tp: 2, ep: 2}", "{zero_stage: 2, pp: 2}", pytest.param("{zero_stage: 3}", marks=pytest.mark.full)],
)
def test_zero_sends_what_the_arithmetic_says(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, overrides: str) -> None:
    """But for DeepSpeed's padding."""
    settings = (*FOUR_LAYERS, BATCH, f"parallel={overrides}", "precision=bf16")
    real = ranks.run(ledger_of_a_step, tiny_config(tmp_path, tiny_corpus, *settings).model_dump(), world_size=4)
    for report in dry_run(write_config(tmp_path, tiny_corpus), settings, 4).ranks:
        expected, found = sent(real[report.rank]), sent(report.sent)
        expected = {key: size for key, size in expected.items() if key[1] != "broadcast"}
        assert found.keys() == expected.keys()
        for key, size in expected.items():
            assert float(found[key]) == pytest.approx(float(size), rel=0.02), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "overlaps"),
    [
        ("{zero_stage: 1}", True),
        ("{zero_stage: 2, tp: 2, ep: 2}", True),
        ("{zero_stage: 3}", True),
        ("{zero_stage: 1, pp: 2}", False),
    ],
)
def test_zero_reduces_full_buckets_while_the_last_backward_pass_runs(
    ranks: RankPool, tmp_path: Path, tiny_corpus: Path, overrides: str, overlaps: bool
) -> None:
    """What it cannot hide, the last bucket and what other ranks have too, the arithmetic knows."""
    zero = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 4096}}"
    settings = (*FOUR_LAYERS, BATCH, f"parallel={overrides}", zero)

    def gradients(entries: list[Entry]) -> tuple[float, float]:
        reduced = [e for e in entries if e.axis == "dp" and e.kind in ("all-reduce", "reduce-scatter")]
        return float(sum(e.sent for e in reduced)), float(sum(e.exposed for e in reduced))

    real = ranks.run(ledger_of_a_step, tiny_config(tmp_path, tiny_corpus, *settings).model_dump(), world_size=4)
    for report in dry_run(write_config(tmp_path, tiny_corpus), settings, 4).ranks:
        sent, exposed = gradients(real[report.rank])
        assert exposed < sent / 2 if overlaps else exposed == sent
        assert gradients(report.sent) == (pytest.approx(sent, rel=0.02), pytest.approx(exposed, rel=0.02))


@pytest.mark.parametrize(
    "parallel",
    [
        "{}",
        "{pp: 2}",
        "{pp: 2, tp: 2, ep: 2}",
        "{pp: 2, schedule: interleaved, virtual_stages: 2}",
        "{pp: 2, schedule: zero_bubble}",
        "{pp: 2, schedule: zbv}",
        "{pp: 2, schedule: dualpipev}",
    ],
)
def test_a_few_micro_batches_tell_what_all_do(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    arguments = (
        write_config(tmp_path, tiny_corpus),
        (*FOUR_LAYERS, "batch={sequences: 64, micro_batches: 8}", f"parallel={parallel}"),
        8,
    )
    few = dry_run(*arguments)
    assert module.fewest_micro_batches(few.config) < 8
    monkeypatch.setattr(module, "fewest_micro_batches", lambda config: config.batch.micro_batches)
    for all_of_them, some in zip(dry_run(*arguments).ranks, few.ranks, strict=True):
        assert all_of_them.sent == some.sent
        # the last stage keeps the loss of each micro-batch
        assert all_of_them.memory.activations == pytest.approx(some.memory.activations, abs=8 * 4)


def test_memory_of_one_rank_by_hand(tmp_path: Path, tiny_corpus: Path) -> None:
    config = write_config(tmp_path, tiny_corpus)
    fp32 = dry_run(config, (), 1).ranks[0]
    count = fp32.parameters
    assert (fp32.memory.parameters, fp32.memory.gradients, fp32.memory.optimizer) == (4 * count, 4 * count, 8 * count)
    # 2 layers x 2 norms and the last one stay fp32 and need no master
    islands = 5 * 32
    for stage, shared in ((0, 1), (1, 4)):
        memory = dry_run(config, ("precision=bf16", f"parallel.zero_stage={stage}"), 4).ranks[0].memory
        masters = count if stage else count - islands
        assert memory.parameters == 2 * (count - islands) + 4 * islands
        assert memory.gradients == 4 * count
        assert memory.optimizer == (4 * masters + 8 * count) // shared
    three = dry_run(config, ("parallel.zero_stage=3",), 4).ranks[0].memory
    assert (three.parameters, three.gathered) == (count, 4 * count)


def test_activations_grow_with_the_tokens_and_shrink_with_tensor_parallel_ranks(tmp_path: Path, tiny_corpus: Path) -> None:
    config = write_config(tmp_path, tiny_corpus)
    wide = ("model={width: 256, layers: 4, heads: 8, ffn_width: 1024}", "data.sequence_length=256")

    def activations(world: int, *overrides: str) -> int:
        return (
            dry_run(config, (*wide, "batch.sequences=8", "parallel.zero_stage=0", *overrides), world).ranks[0].memory.activations
        )

    whole = activations(1)
    assert activations(2) == pytest.approx(whole / 2, rel=0.25)
    assert activations(2, "parallel.tp=2") == pytest.approx(whole / 2, rel=0.25)
    assert activations(1, "batch.micro_batches=4") == pytest.approx(whole / 4, rel=0.25)


def test_streams_one_after_the_other_need_the_activations_of_one(tmp_path: Path, tiny_corpus: Path) -> None:
    def activations(streams: int, recompute: str) -> int:
        overrides = (f"model.streams.count={streams}", "data.sequence_length=512", f"parallel.recompute={recompute}")
        return dry_run(write_config(tmp_path, tiny_corpus), (*FOUR_LAYERS[:1], *overrides), 1).ranks[0].memory.activations

    together, apart = activations(8, "none"), activations(8, "stream")
    assert apart < 0.4 * together
    assert apart < 3 * activations(1, "none")


def test_a_dry_run_needs_no_corpus_where_the_vocabulary_is_given_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="there is no such corpus"):
        dry_run(config, (), 1)
    command = ["train", "--config", str(config), "--dry-run", "--world", "64", "model.vocab_size=300", "batch.sequences=64"]
    assert main(command) == 0
    assert "64 ranks" in capsys.readouterr().out
    assert main([*command[:3], "--json", *command[3:]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world"], found["layout"]["dp"], found["zero_stage"]) == (64, 64, 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_under_a_launcher_one_process_answers_for_its_ranks(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--config", str(write_config(tmp_path, tiny_corpus)), "--dry-run", "--json"]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert json.loads(printed)["world"] == 4 if rank == "0" else not printed


def test_a_layout_that_does_not_fit_is_refused_as_at_a_real_start(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, tiny_corpus))
    assert main(["train", "--config", config, "--dry-run", "--world", "6", "parallel.tp=4"]) == 2
    assert "world 6 is not a multiple" in capsys.readouterr().err
    assert main(["train", "--config", config, "--world", "6"]) == 2
    assert "--dry-run" in capsys.readouterr().err


# Shipped models -------------------------------------------------------------------------------------------------------

SHIPPED = {
    "all_axes_1.4b": (64, "{tp: 4, pp: 2, ep: 8}", 2),
    "clark_1.3b": (64, "{tp: 2, pp: 2}", 2),
    "clark_1.3b_e512": (256, "{tp: 2, pp: 2, ep: 16}", 2),
    "clark_130m": (64, "{}", 1),
    "clark_130m_e128": (128, "{ep: 16}", 1),
    "clark_15m": (64, "{}", 1),
    "clark_15m_e512": (128, "{ep: 16}", 1),
    "clark_25m": (64, "{tp: 2}", 1),
    "clark_370m": (64, "{tp: 4}", 1),
    "clark_370m_e64": (256, "{tp: 2, ep: 32}", 1),
    "clark_55m": (64, "{}", 1),
    "llama_3.1_8b": (1024, "{tp: 8, pp: 4}", 4),
    "llama_3.2_1b": (64, "{tp: 2, pp: 2}", 2),
    "parscale_0.5b": (64, "{}", 1),
    "parscale_0.7b": (64, "{zero_stage: 3}", 1),
    "parscale_1.1b": (64, "{tp: 2}", 1),
    "parscale_1.6b": (64, "{tp: 4}", 1, "model.streams.count=2"),
    "parscale_2.8b": (128, "{tp: 4}", 1),
    "parscale_4.4b": (256, "{tp: 8}", 1, "model.streams.count=8"),
    "quickstart": (64, "{ep: 4}", 1, "model.vocab_size=4096"),
    "qwen3_30b_a3b": (512, "{tp: 4, pp: 2, ep: 32, etp: 4}", 2),
}


def write_run(folder: Path, name: str) -> tuple[Path, tuple[str, ...], int]:
    """A run of a shipped model: its file, overrides and world; one sequence a rank and micro-batch."""
    world, layout, micro_batches, *overrides = SHIPPED[name]
    path = folder / "run.yaml"
    path.write_text(
        f"include: [{MODELS / name}.yaml]\nprecision: bf16\ndata: {{sequence_length: 2048, sources: [{{path: none}}]}}\n"
    )
    return (
        path,
        (f"parallel={layout}", f"batch={{sequences: {world * micro_batches}, micro_batches: {micro_batches}}}", *overrides),
        world,
    )


def distinct_elements(config: Config, layout: Layout) -> int:
    """Elements of all pieces of parameters that any rank has, each piece once."""
    pieces: dict[tuple[str, tuple[int, ...]], int] = {}
    seen = set()
    for rank in range(layout.world):
        place = layout.place(rank)
        key = (place["pp"], place["tp"], layout.expert_peers(rank).index(rank))
        if key in seen:  # another rank on the same place of all axes that split parameters
            continue
        seen.add(key)
        mesh = Mesh(World(rank, layout.world, Device(torch.device("meta"), "")), layout)
        for stage in own_stages(config, mesh):
            decoder = whole_on_meta(config.model)
            cut(decoder, stage, config)
            placements = shard(decoder, mesh)
            for name, parameter in named_parameters(decoder).items():
                pieces[name, placements[name].offsets] = parameter.numel()
    return sum(pieces.values())


def test_every_shipped_model_is_in_the_table() -> None:
    assert SHIPPED.keys() == {path.stem for path in MODELS.glob("*.yaml")}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_runs_dry_on_many_ranks(tmp_path: Path, name: str) -> None:
    path, overrides, world = write_run(tmp_path, name)
    found = dry_run(path, overrides, world)
    assert found.parameters == parameters(found.config.model).total
    stages = [layer for report in found.ranks for layers in report.layers.values() for layer in layers]
    assert sorted(stages) == list(range(found.config.model.layers))
    assert all(min(vars(report.memory).values()) >= 0 and report.memory.activations for report in found.ranks)
    assert all(any(entry.axis == "dp" for entry in report.sent) for report in found.ranks)


@pytest.mark.parametrize("name", full_unless(set(SHIPPED) - {"qwen3_30b_a3b"}, SHIPPED))
def test_the_pieces_on_all_ranks_make_up_a_shipped_model(tmp_path: Path, name: str) -> None:
    path, overrides, world = write_run(tmp_path, name)
    config = resolve(load_config(path, overrides).config)
    assert distinct_elements(config, make_layout(config.parallel, config.model, world)) == parameters(config.model).total
