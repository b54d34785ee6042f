"""Layouts: the arithmetic of ranks, stages and batches; what cannot work is refused with the nearest that does."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.layout import data_parallel_ranks, rank_of_stage, stage_count, stages_of_rank, zero_stage_of
from megascale.config.layout_search import layouts, nearest, nearest_worlds
from megascale.config.load import LoadedConfig, load_config
from megascale.config.schema import Batch, Config, Parallel


def load(folder: Path, text: str, *overrides: str) -> LoadedConfig:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, text: str, world: int | None = None) -> str:
    loaded = load(folder, text)
    with pytest.raises(InputError) as caught:
        check(loaded, world)
    return str(caught.value).replace(f"{folder}/", "")


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


@given(st.integers(1, 16), st.integers(1, 16))
def test_dp_follows_from_the_world(dp: int, world: int) -> None:
    assert data_parallel_ranks(Parallel(), world) == world
    assert data_parallel_ranks(Parallel(dp=dp), world) == dp
    assert data_parallel_ranks(Parallel(), None) is None


@pytest.mark.parametrize(
    ("parallel", "stages"),
    [
        ({}, 1),
        ({"pp": 4}, 4),
        ({"pp": 4, "virtual_stages": 2}, 4),
        ({"pp": 4, "virtual_stages": 2, "schedule": "interleaved"}, 8),
        ({"pp": 1, "virtual_stages": 2, "schedule": "interleaved"}, 1),
        ({"pp": 4, "schedule": "zero_bubble"}, 4),
        ({"pp": 4, "virtual_stages": 2, "schedule": "zero_bubble"}, 8),
        ({"pp": 4, "schedule": "zbv"}, 8),
        ({"pp": 4, "schedule": "dualpipev"}, 8),
        ({"pp": 1, "schedule": "zbv"}, 1),
    ],
)
def test_the_schedule_says_how_many_stages_a_pipeline_rank_has(parallel: dict[str, Any], stages: int) -> None:
    assert stage_count(Parallel(**parallel)) == stages


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("1f1b", [0, 1, 2]), ("interleaved", [0, 1, 2, 0, 1, 2]), ("zbv", [0, 1, 2, 2, 1, 0]), ("dualpipev", [0, 1, 2, 2, 1, 0])],
)
def test_stages_go_round_the_ranks_or_forth_and_back(schedule: Any, ranks: list[int]) -> None:
    parallel = Parallel(pp=3, schedule=schedule, virtual_stages=2)
    assert [rank_of_stage(stage, parallel) for stage in range(stage_count(parallel))] == ranks
    assert [stages_of_rank(rank, parallel) for rank in range(3)] == [
        [stage for stage, holder in enumerate(ranks) if holder == rank] for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("settings", "world", "stage"),
    [
        ({}, 1, 0),
        ({}, 2, 1),
        ({"parallel": {"tp": 2}}, 2, 0),
        ({"parallel": {"tp": 2, "pp": 2}}, 8, 1),
        ({"optimizer": {"name": "muon"}}, 2, 1),
        ({"parallel": {"zero_stage": 0}}, 2, 0),
        ({"parallel": {"zero_stage": 3}}, 1, 3),
    ],
)
def test_zero_shards_the_optimizer_where_data_parallel_ranks_repeat_it(settings: dict[str, Any], world: int, stage: int) -> None:
    assert zero_stage_of(config(**settings), world) == stage


EIGHT_HEADS = "model: {heads: 8}\n"
EIGHT_EXPERTS = "model: {experts: {count: 8}}\n"
TWO_MICRO_BATCHES = "batch: {micro_batches: 2}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            EIGHT_HEADS + "parallel: {tp: 3}",
            "parallel.tp: tp 3 does not divide model.heads 8, data.sequence_length 512, model.ffn_width 704; tp 2 or 4 work",
        ),
        (
            EIGHT_HEADS + "parallel: {tp: 9}",
            "tp 9 does not divide model.heads 8, data.sequence_length 512, model.ffn_width 704; tp 8",
        ),
        (
            "model: {heads: 12, width: 384, kv_heads: 6}\nparallel: {tp: 4}",
            "tp 4 neither divides model.kv_heads 6 nor is a multiple",
        ),
        ("data: {sequence_length: 510}\nparallel: {tp: 4}", "tp 4 does not divide data.sequence_length 510; tp 2 works"),
        ("model: {ffn_width: 102}\nparallel: {tp: 4}", "tp 4 does not divide model.ffn_width 102; tp 2 works"),
        (
            "model: {experts: {count: 2, every: 2, width: 8}, ffn_width: 102}\nparallel: {tp: 4}",
            "tp 4 does not divide model.ffn_width 102; tp 2 works",
        ),
        (
            "model: {heads: 16, experts: {count: 2, shared: 1, width: 8}}\nparallel: {tp: 16}",
            "tp 16 does not divide model.experts.shared x width 8; tp 8 works",
        ),
        ("optimizer: {name: muon}\nparallel: {tp: 2}", "tp 2 would cut the matrices, which Muon needs whole"),
        (
            "batch: {micro_batches: 8}\nparallel: {pp: 5}",
            "parallel.pp: pp 5 is more than the 4 layers (model.layers); pp 4 works",
        ),
        (
            "batch: {micro_batches: 8}\nparallel: {pp: 4, schedule: interleaved, virtual_stages: 2}",
            "pp 4 x virtual_stages 2 = 8 stages is more than the 4 layers (model.layers); pp 2 works",
        ),
        ("parallel: {pp: 2}", "pp 2 needs batch.micro_batches of at least 2, given 1; pp 1 works; or batch.micro_batches 2"),
        (
            "model: {layers: 8}\nbatch: {sequences: 72, micro_batches: 9}\nparallel: {pp: 4, schedule: interleaved, virtual_stages: 2}",
            "which do not divide batch.micro_batches 9; pp 3 works; or batch.micro_batches 8 or 12",
        ),
        (
            "batch: {micro_batches: 8}\nparallel: {pp: 4, schedule: zbv}",
            "pp 4 x 2 stages a rank = 8 stages is more than the 4 layers (model.layers); pp 2 works",
        ),
        (
            TWO_MICRO_BATCHES + "parallel: {pp: 2, schedule: dualpipev}",
            "pp 2 needs batch.micro_batches of at least 4, given 2; pp 1 works; or batch.micro_batches 4",
        ),
        (
            TWO_MICRO_BATCHES + "compile: 'on'\nparallel: {pp: 2, schedule: zero_bubble}",
            "zero_bubble keeps gradients of the weights for later, which torch.compile cannot trace; set compile=auto",
        ),
        (TWO_MICRO_BATCHES + "parallel: {pp: 2, schedule: zbv, virtual_stages: 3}", "has no effect: parallel.schedule is zbv"),
        ("parallel: {ep: 2}", "parallel.ep: ep 2 has no experts to spread (model.experts.count is 1); ep 1 works"),
        (EIGHT_EXPERTS + "parallel: {ep: 6}", "ep 6 does not divide model.experts.count 8; ep 4 or 8 work"),
        (EIGHT_EXPERTS + "parallel: {dp: 2, tp: 2, ep: 8}", "ep 8 does not divide the 4 ranks of a pipeline stage"),
        (EIGHT_EXPERTS + "parallel: {tp: 2, etp: 4}", "parallel.etp: etp 4 is neither 1 nor tp 2; etp 1 or 2 work"),
        ("parallel: {tp: 2, etp: 2}", "parallel.etp: etp 2 has no experts to split (model.experts.count is 1); etp 1 works"),
        (
            "model: {experts: {count: 8, width: 24}}\nprecision: bf16\nparallel: {tp: 2, etp: 2}",
            "etp 2 does not cut model.experts.width 24 into multiples of 8, 16 bytes of bf16; etp 1 works; or model.experts.width 16 or 32",
        ),
        (
            EIGHT_EXPERTS + "parallel: {dp: 2, tp: 2, ep: 4, etp: 2}",
            "ep 4 does not divide the 2 ranks of a pipeline stage with the same part of an expert (dp x stream x cp); ep 2 works",
        ),
        (TWO_MICRO_BATCHES + "parallel: {pp: 2, zero_stage: 3}", "pp 2 is not possible with parallel.zero_stage 3; pp 1 works"),
        (EIGHT_EXPERTS + "parallel: {ep: 2, zero_stage: 3}", "ep 2 is not possible with parallel.zero_stage 3; ep 1 works"),
        (
            "parallel: {stream: 2}",
            "parallel.stream: stream 2 does not divide the 1 streams (model.streams.count); stream 1 works",
        ),
        (
            "model: {streams: {count: 4}}\nschedule: {phases: [{steps: 1, streams: 1}, {steps: 1}]}\nparallel: {stream: 2}",
            "stream 2 does not divide the 1 streams of a phase (schedule.phases.streams); stream 1 works",
        ),
        ("model: {streams: {count: 6}}\nparallel: {stream: 3}", "stream 3 x cp 1 x tp 1 does not divide data.sequence_length"),
        (
            "model: {streams: {count: 2}}\nparallel: {stream: 2, recompute: stream}",
            "stream keeps one stream's activations at a time, and each rank has one; set parallel.recompute=layer",
        ),
        ("parallel: {cp: 3}", "cp 3 x 2 chunks x tp 1 x stream 1 does not divide data.sequence_length"),
        (
            "model: {kv_heads: 2}\nparallel: {cp: 4, context: ulysses}",
            "cp 4 does not divide the 2 key/value heads of a rank, which ulysses shares",
        ),
        ("model: {sliding_window: 8}\nparallel: {cp: 2}", "gathers keys without a window (model.sliding_window), which"),
        (
            "model: {experts: {count: 8, capacity_factor: 1.0}}\nparallel: {cp: 2}",
            "leaves tokens out of the order by which capacity is given, which parallel.context=ulysses keeps",
        ),
        (
            "model: {altup: {form: sequence}}\nparallel: {cp: 2}",
            "whose kept tokens are not shared evenly (model.altup.form); cp 1",
        ),
        (
            TWO_MICRO_BATCHES + "parallel: {pp: 2, schedule: interleaved}",
            "interleaved needs at least 2 stages a rank; set parallel.virtual_stages=2, or parallel.schedule=1f1b",
        ),
        (
            "compile: 'on'\nparallel: {zero_stage: 3}",
            "3 gathers weights inside the layers, which torch.compile would trace; set compile=auto",
        ),
        (
            "optimizer: {name: muon}\nparallel: {zero_stage: 3}",
            "3 cuts the matrices, which Muon needs whole; set parallel.zero_stage=2",
        ),
        ("parallel: {schedule: interleaved}", "parallel.schedule: has no effect: parallel.pp is 1"),
        ("parallel: {virtual_stages: 2}", "parallel.virtual_stages: has no effect: parallel.pp is 1"),
        (TWO_MICRO_BATCHES + "parallel: {pp: 2, virtual_stages: 2}", "virtual_stages: has no effect: parallel.schedule is 1f1b"),
        ("parallel: {dp: 3}", "16 sequences / 1 micro-batches / dp 3 = 5.33 per rank"),
    ],
)
def test_an_axis_that_does_not_fit_is_one_error_with_the_nearest_values(tmp_path: Path, text: str, reason: str) -> None:
    printed = refusal(tmp_path, text)
    assert reason in printed
    assert "1 problem in the config" in printed


@pytest.mark.parametrize(
    ("text", "world"),
    [
        (EIGHT_HEADS + "parallel: {tp: 8}", 8),
        ("model: {heads: 12, width: 384, kv_heads: 2, ffn_width: 768}\nparallel: {tp: 4}", 4),
        ("model: {experts: {count: 2, width: 8}, ffn_width: 102}\nparallel: {tp: 4, ep: 2}", 4),
        (TWO_MICRO_BATCHES + "model: {layers: 3}\nparallel: {pp: 2}", 8),
        (TWO_MICRO_BATCHES + "parallel: {pp: 2, schedule: interleaved, virtual_stages: 2}", 2),
        (EIGHT_EXPERTS + "parallel: {tp: 2, ep: 8}", 8),
        (EIGHT_EXPERTS + "parallel: {tp: 2, ep: 4, etp: 2}", 8),
        (EIGHT_EXPERTS + "parallel: {tp: 2, etp: 2, zero_stage: 3}", 8),
        (EIGHT_EXPERTS + "batch: {micro_batches: 2}\noptimizer: {name: muon}\nparallel: {pp: 2, ep: 4, zero_stage: 0}", 8),
        ("parallel: {tp: 2, zero_stage: 3}", 8),
        ("model: {tie_embeddings: true}\n" + TWO_MICRO_BATCHES + "parallel: {pp: 2, tp: 2}", 8),
    ],
)
def test_layouts_that_fit_pass_in_silence(tmp_path: Path, text: str, world: int) -> None:
    assert check(load(tmp_path, text), world) == []


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            "parallel: {pp: 4, schedule: interleaved, virtual_stages: 2}\nmodel: {layers: 8}",
            "parallel.pp: pp 4 with 1 micro-batches x 2 stages a rank: ranks wait 75% of the time",
        ),
        (TWO_MICRO_BATCHES + "parallel: {pp: 2, zero_stage: 2}", "parallel.zero_stage: 2 saves no memory over 1 with a pipeline"),
    ],
)
def test_wasteful_layouts_are_warned_about(tmp_path: Path, text: str, warning: str) -> None:
    (printed,) = check(load(tmp_path, text))
    assert warning in printed


def test_the_world_must_be_the_product_of_the_axes(tmp_path: Path) -> None:
    text = refusal(tmp_path, "batch: {sequences: 12, micro_batches: 2}\nparallel: {dp: 3, pp: 2, tp: 2}", world=8)
    assert "world 8 != pp 2 x dp 3 x stream 1 x cp 1 x tp 2 (= 12); dp 2 works" in text
    text = refusal(tmp_path, "parallel: {tp: 3}", world=8)
    assert "world 8 is not a multiple of pp 1 x stream 1 x cp 1 x tp 3 (= 3), so no dp fits; the nearest world is 6 or 9" in text


def test_a_world_without_a_dp_is_one_problem_not_also_one_of_the_batch(tmp_path: Path) -> None:
    assert "1 problem in the config" in refusal(tmp_path, "parallel: {tp: 4}", world=14)


def test_a_world_that_cannot_share_the_batch_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, "batch: {sequences: 16, micro_batches: 2}", world=3)
    assert "16 sequences / 2 micro-batches / dp 3 = 2.67 per rank, not a whole number; the nearest that works is 12 or 18" in text
    assert check(load(tmp_path, "batch: {sequences: 16, micro_batches: 2}"), world=8) == []


def test_a_layout_that_does_not_fit_its_world_comes_with_whole_layouts_that_do(tmp_path: Path) -> None:
    text = refusal(tmp_path, EIGHT_HEADS + "parallel: {tp: 3}", world=8)
    assert "-> the nearest layouts of 8 ranks that work: pp 1 x dp 2 x tp 4; pp 1 x dp 4 x tp 2; pp 1 x dp 1 x tp 8" in text
    text = refusal(tmp_path, EIGHT_EXPERTS + "parallel: {ep: 8}", world=4)
    assert "of 4 ranks that work: pp 1 x dp 4 x tp 1, ep 4;" in text
    interleaved = "parallel: {pp: 3, schedule: interleaved, virtual_stages: 2}\n" + TWO_MICRO_BATCHES
    assert "the layouts of 2 ranks that work: pp 2 x dp 1 x tp 1\n" in refusal(tmp_path, interleaved, world=2) + "\n"
    assert "no layout of 7 ranks works with the other settings; 4 or 8 ranks do" in refusal(tmp_path, "parallel: {}", world=7)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_exactly_the_batches_that_divide_are_accepted(sequences: int, micro_batches: int, world: int) -> None:
    loaded = LoadedConfig(Config(batch=Batch(sequences=sequences, micro_batches=micro_batches)))
    if sequences % (micro_batches * world) == 0:
        check(loaded, world)
    else:
        with pytest.raises(InputError):
            check(loaded, world)


@settings(max_examples=40)
@given(
    heads=st.sampled_from([2, 6, 8]),
    layers=st.integers(1, 6),
    experts=st.sampled_from([1, 4, 6]),
    micro_batches=st.sampled_from([1, 2, 4]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    splits_width=st.booleans(),
    world=st.integers(1, 24),
)
def test_the_proposed_layouts_are_exactly_those_that_pass_the_checks(
    heads: int, layers: int, experts: int, micro_batches: int, optimizer: str, splits_width: bool, world: int
) -> None:
    wanted = config(
        model={"width": 96, "heads": heads, "layers": layers, "experts": {"count": experts}},
        data={"sequence_length": 48},
        batch={"sequences": 48, "micro_batches": micro_batches},
        optimizer={"name": optimizer},
        parallel={"tp": 2, "etp": 2} if splits_width else {},
    )
    passing = set()
    shapes = ((pp, tp) for pp in range(1, 7) for tp in range(1, 9) if world % (pp * tp) == 0)
    for pp, tp, ep in ((pp, tp, ep) for pp, tp in shapes for ep in range(1, 7)):
        tried = wanted.model_copy(update={"parallel": Parallel(pp=pp, tp=tp, ep=ep, etp=tp if splits_width else 1)})
        try:
            check(LoadedConfig(tried), world)
        except InputError:
            continue
        passing.add((pp, tp, ep))
    assert {(layout.pp, layout.tp, layout.ep) for layout in layouts(wanted, world)} == passing
    assert all(layouts(wanted, near) for near in nearest_worlds(wanted, world))


def test_the_nearest_values_are_searched_below_and_above() -> None:
    assert nearest(5, lambda number: number in (1, 3, 8, 9), 10) == [3, 8]
    assert nearest(5, lambda number: number == 1, 10) == [1]
    assert nearest(10**12, lambda number: number == 4, 10**15) == [4]


def test_the_schedules_of_torch_take_exactly_the_micro_batches_that_pass_the_checks(tmp_path: Path) -> None:
    """The stage is a stand-in with what the constructors read."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

    class Stage:
        has_backward, is_first, submod, device = True, False, None, "cpu"

        def __init__(self, index: int, pp: int, stages: int):
            self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, pp, 0
            self.is_last = index == stages - 1
            self.stage_index_to_group_rank: dict[int, int] = {}

    def constructs(make: Any) -> bool:
        try:
            make()
        except ValueError:
            return False
        return True

    outcomes: dict[bool, int] = defaultdict(int)
    kinds: dict[str, Any] = {
        "1f1b": lambda stages, m: schedules.Schedule1F1B(stages[0], m),
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }
    several = [("interleaved", 2), ("interleaved", 3), ("zero_bubble", 2)]
    for pp, micro_batches in ((pp, count) for pp in (2, 3, 4) for count in range(1, 12)):
        for name, virtual in [("1f1b", None), ("zero_bubble", None), ("zbv", None), ("dualpipev", None), *several]:
            settings = {"pp": pp, "schedule": name} | ({"virtual_stages": virtual} if virtual else {})
            parallel = Parallel.model_validate(settings)
            stages = [Stage(index, pp, stage_count(parallel)) for index in stages_of_rank(0, parallel)]
            works = constructs(lambda name=name, stages=stages, m=micro_batches: kinds[name](stages, m))
            tried = config(
                model={"layers": 12}, batch={"sequences": micro_batches, "micro_batches": micro_batches}, parallel=settings
            )
            if works:
                check(LoadedConfig(tried))
            else:
                with pytest.raises(InputError, match="micro_batches"):
                    check(LoadedConfig(tried))
            outcomes[works] += 1
    assert outcomes[True] > 20
    assert outcomes[False] > 5
