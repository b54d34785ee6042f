"""Every config that is shipped is valid as it stands, without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", sorted((CONFIGS / "runs").glob("*.yaml")), ids=names)
def test_a_shipped_run_is_valid(path: Path) -> None:
    assert check(load_config(path), world=1) == []


@pytest.mark.parametrize("path", MODELS, ids=names)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shipped_model_is_valid_in_a_run_on_8_ranks(tmp_path: Path, path: Path, precision: str) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"include: [{path}]\nrun: {{name: dummy}}\ndata: {{sequence_length: 2048}}\nprecision: {precision}\n", encoding="utf-8"
    )
    loaded = load_config(run)
    assert check(loaded, world=8) == []
    assert resolve(loaded.config).model.vocab_size or path.stem == "quickstart", (
        "only the quickstart takes its corpus's vocabulary"
    )


@pytest.mark.parametrize(
    ("model", "layout", "world"),
    [
        ("llama_3.1_8b", "{tp: 8, pp: 4}", 64),
        ("llama_3.1_8b", "{pp: 4, schedule: interleaved, virtual_stages: 4}", 32),
        ("qwen3_30b_a3b", "{tp: 4, ep: 32, pp: 2}", 64),
        ("all_axes_1.4b", "{ep: 8}", 8),
        ("all_axes_1.4b", "{tp: 4, pp: 2, ep: 4}", 8),
        ("parscale_1.6b", "{tp: 8, zero_stage: 3}", 16),
    ],
)
def test_layouts_these_models_are_meant_for_fit(tmp_path: Path, model: str, layout: str, world: int) -> None:
    run = tmp_path / "run.yaml"
    rest = "batch: {sequences: 256, micro_batches: 8}\ndata: {sequence_length: 4096}\nprecision: bf16\n"
    run.write_text(f"include: [{CONFIGS / 'models' / model}.yaml]\nparallel: {layout}\n{rest}", encoding="utf-8")
    assert check(load_config(run), world) == []


def test_a_layout_that_a_shipped_model_refuses(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"include: [{CONFIGS / 'models' / 'qwen3_30b_a3b.yaml'}]\nparallel: {{ep: 24}}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"ep 24 does not divide model\.experts\.count 128; ep 16 or 32 work"):
        check(load_config(run))
