"""A run of a middling model to plan, in any layout."""

from __future__ import annotations

from pathlib import Path

from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.plan.rank import Plan

BASE = """
run: {name: planned}
model: {vocab_size: 32768, width: 2048, layers: 8, heads: 16, kv_heads: 4, ffn_width: 5632}
data: {sequence_length: 4096}
batch: {sequences: 64, micro_batches: 8}
precision: bf16
"""
FINE = "model.experts={count: 32, per_token: 4, width: 1408}"
P2, P4 = "model.streams={count: 2}", "model.streams={count: 4}"


def config_file(folder: Path) -> Path:
    """The run's file."""
    path = folder / "planned.yaml"
    path.write_text(BASE)
    return path


def plan_of(folder: Path, world: int, *overrides: str) -> Plan:
    """The run on so many ranks, with overrides."""
    return Plan(resolve(load_config(config_file(folder), overrides).config), world)
