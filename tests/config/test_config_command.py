"""`megascale config`: what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.commands.config import add_arguments, run
from megascale.config.errors import InputError
from megascale.config.load import load_config


def command(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  width: 512\n  sliding_window: 512\n", encoding="utf-8")
    return path


def test_show_prints_a_config_with_derived_values(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("show", file, "model.layers=3") == 0
    shown = capsys.readouterr().out
    assert "  layers: 3\n" in shown
    assert "  head_dim: 128\n" in shown
    file.write_text(shown, encoding="utf-8")
    assert load_config(file).config.model.head_dim == 128


def test_show_marks_origins(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("show", file, "model.layers=3", "--origin")
    shown = capsys.readouterr().out
    assert f"  width: 512  # {file}:2\n" in shown
    assert "  layers: 3  # override 1: model.layers=3\n" in shown
    assert "  head_dim: 128  # derived\n" in shown
    assert "  heads: 4  # default\n" in shown


def test_show_prints_comments_and_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("show", file, "--comments")
    assert "  width: 512  # d, width" in capsys.readouterr().out
    command("show", file, "--json")
    assert json.loads(capsys.readouterr().out)["model"]["head_dim"] == 128
    command("show", file, "--json", "--origin")
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["model"]["width"] == 512
    assert shown["origin"]["model.width"] == f"{file}:2"


def test_validate_prints_warnings_and_refuses_wrong_layouts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("validate", file, "--world", "4") == 0
    printed = capsys.readouterr().out
    assert f"warning: {file}:3: model.sliding_window" in printed
    assert "valid" in printed
    with pytest.raises(InputError, match="dp 3"):
        command("validate", file, "--world", "3")
    with pytest.raises(InputError, match="not a number of ranks"):
        command("validate", file, "--world", "0")
    assert command("validate", file, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 1


def test_diff_prints_the_settings_that_differ(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = file.with_name("b.yaml")
    other.write_text("model: {width: 512, sliding_window: 512}\nschedule: {steps: 500}\n", encoding="utf-8")
    assert command("diff", file, file) == 0
    assert capsys.readouterr().out == ""
    assert command("diff", file, other) == 1
    assert capsys.readouterr().out == "schedule.steps: 1000 -> 500\n"
    assert command("diff", file, other, "--json") == 1
    assert json.loads(capsys.readouterr().out) == [{"setting": "schedule.steps", "first": 1000, "second": 500}]


def test_schema_is_a_json_schema_with_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["Model"]["properties"]["width"]["description"].startswith("d, width")
    assert "include" in schema["properties"]
    assert schema["additionalProperties"] is False


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "numpy", "datasets", "wandb")
    code = f"import sys, megascale.commands.config; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
