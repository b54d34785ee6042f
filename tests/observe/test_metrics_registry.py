"""The registry knows every name of the design, refuses others, and says which values a resume may change."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.observe.metrics import METRICS, TIMING, check_record, metric_of, name_regex, reproducible

LAYERS = st.integers(0, 500)


DESIGN = (
    "lineage step phase tokens flops_total sequences train/lm_loss train/total_loss train/grad_norm train/aux/balance "
    "train/aux/router_z optim/lr/matrices val/stdlib/loss val/stdlib/bits_per_byte perf/step_seconds perf/tokens_per_second "
    "perf/tokens_per_second_per_gpu perf/tflops_per_gpu perf/mfu perf/mfu_full perf/hfu perf/data_seconds memory/peak_gib "
    "memory/rss_gib moe/layer_03/load_max_over_mean moe/layer_03/load_entropy moe/layer_117/idle_experts "
    "streams/aggregator_entropy streams/weight_p0 altup/layer_00/divergence altup/gain data/epoch/stdlib "
    "data/share/stdlib guard/skipped_steps"
)


@pytest.mark.parametrize("name", DESIGN.split())
def test_names_of_the_design_are_registered(name: str) -> None:
    check_record([name])


@pytest.mark.parametrize(
    "name", ["loss", "train/lm_losses", "xstep", "moe/layer_3/load_entropy", "val/a/b/loss", "streams/weight_px", "optim/lr/"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="is not in megascale"):
        check_record(["step", name])


@given(layer=LAYERS, p=LAYERS, text=st.from_regex(r"\A[A-Za-z0-9._-]+\Z"))
def test_each_filled_pattern_belongs_to_its_own_metric_only(layer: int, p: int, text: str) -> None:
    for metric in METRICS:
        name = metric.name_pattern.format(layer=f"{layer:02d}", p=p, source=text, group=text)
        assert metric_of(name) is metric
        assert [m for m in METRICS if re.match(name_regex(m.name_pattern), name)] == [metric]


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(m.unit and m.meaning and m.section for m in METRICS)
    assert len({m.name_pattern for m in METRICS}) == len(METRICS)


def test_only_times_rates_memory_and_lineage_may_change_after_a_resume() -> None:
    assert {pattern.split("/")[0] for pattern in TIMING} == {"perf", "memory"}
    record = {"lineage": 2, "step": 7, "train/lm_loss": 1.5, "perf/mfu": 0.4, "memory/rss_gib": 1.0, "guard/skipped_steps": 0}
    assert reproducible(record) == {"step": 7, "train/lm_loss": 1.5, "guard/skipped_steps": 0}
