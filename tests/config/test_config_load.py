"""Files, includes and overrides to one tree that knows its places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.schema import Config


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_changes_what_it_names_and_leaves_the_defaults(tmp_path: Path) -> None:
    loaded = load_config(
        write(tmp_path, "a.yaml", "model:\n  width: 512\noptimizer: {lr: 1e-4, betas: [0, 0.9], clip: 1}\ncompile: on\n")
    )
    assert loaded.config.model.width == 512
    assert loaded.config.model.layers == 4
    assert loaded.config.optimizer.lr == 1e-4
    assert loaded.config.optimizer.betas == (0.0, 0.9)
    assert type(loaded.config.optimizer.clip) is float
    assert loaded.config.compile == "on"


def test_every_setting_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model:\n  width: 512\n  streams:\n    count: 2\noptimizer:\n  betas:\n  - 0.8\n  - 0.9\n")
    loaded = load_config(path, ["schedule.steps=7"])
    assert loaded.place("model", "width") == f"{path}:2"
    assert loaded.place("model", "streams", "count") == f"{path}:4"
    assert loaded.place("optimizer", "betas", 1) == f"{path}:8"
    assert loaded.place("schedule", "steps") == "override 1: schedule.steps=7"
    assert loaded.place("batch", "sequences") == str(path)
    assert loaded.is_set("model", "width")
    assert not loaded.is_set("model", "layers")


def test_later_files_win_key_by_key_and_the_including_file_wins_over_all(tmp_path: Path) -> None:
    write(tmp_path, "models/one.yaml", "model: {width: 100, layers: 1, heads: 1}\n")
    write(tmp_path, "models/two.yaml", "include: one.yaml\nmodel: {layers: 2, heads: 2}\n")
    write(tmp_path, "three.yaml", "optimizer: {betas: [0.5, 0.6]}\nobserve: {wandb: {tags: [a, b]}}\n")
    path = write(
        tmp_path, "run/a.yaml", "include: [../models/two.yaml, ../three.yaml]\nmodel: {heads: 4}\nobserve: {wandb: {tags: [c]}}\n"
    )
    loaded = load_config(path)
    assert (loaded.config.model.width, loaded.config.model.layers, loaded.config.model.heads) == (100, 2, 4)
    assert loaded.config.observe.wandb.tags == ("c",)
    assert loaded.config.optimizer.betas == (0.5, 0.6)
    assert loaded.place("model", "width") == f"{tmp_path}/models/one.yaml:1"
    assert loaded.place("model", "layers") == f"{tmp_path}/models/two.yaml:2"
    assert loaded.place("model", "heads") == f"{path}:2"
    assert ("observe", "wandb", "tags", 1) not in loaded.origin


def test_a_file_may_be_included_twice_but_not_by_itself(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model: {width: 64}\n")
    write(tmp_path, "left.yaml", "include: base.yaml\nmodel: {layers: 2}\n")
    both = write(tmp_path, "both.yaml", "include: [left.yaml, base.yaml]\n")
    assert load_config(both).config.model.layers == 2
    write(tmp_path, "one.yaml", "include: [two.yaml]\n")
    write(tmp_path, "two.yaml", "include: [one.yaml]\n")
    with pytest.raises(InputError, match=r"include each other: one.yaml -> two.yaml -> one.yaml"):
        load_config(tmp_path / "one.yaml")


def test_a_missing_include_names_both_files(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "include: [gone.yaml]\n")
    with pytest.raises(InputError, match=r"gone.yaml: there is no such file; it is included by a.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no settings"),
        ("# comment\n", "holds no settings"),
        ("- model\n", "holds a list"),
        ("model\n", "holds a single value"),
        ("include: 3\n", "include is neither"),
        ("include: [[a]]\n", "include is neither"),
        ("include:\nmodel: {width: 8}\n", "include is neither"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_config(write(tmp_path, "a.yaml", text))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {folder: Käse}".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


SOURCES = "data:\n  sources:\n  - path: a\n  - path: b\n"


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optimizer.lr=1e-4", lambda config: config.optimizer.lr, 1e-4),
        ("optimizer.clip=null", lambda config: config.optimizer.clip, None),
        ("compile=off", lambda config: config.compile, "off"),
        ("run.folder=a=b", lambda config: config.run.folder, "a=b"),
        ("data.sources.1.weight=2", lambda config: config.data.sources[1].weight, 2.0),
        ("optimizer.betas.0=0.5", lambda config: config.optimizer.betas[0], 0.5),
        ("data.sources=[{path: c}]", lambda config: [source.path for source in config.data.sources], ["c"]),
        ("optimizer.muon.lr=0.5", lambda config: config.optimizer.muon.lr, 0.5),
    ],
)
def test_overrides_set_one_place(tmp_path: Path, override: str, get: Callable[[Config], object], value: object) -> None:
    path = write(tmp_path, "a.yaml", SOURCES + "optimizer: {betas: [0.1, 0.2], muon: null}\n")
    assert get(load_config(path, [override]).config) == value


def test_an_override_of_a_section_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model: {experts: {count: 8, per_token: 2}}\n")
    loaded = load_config(path, ["model.experts={count: 1}"])
    assert loaded.config.model.experts.per_token == 1
    assert not loaded.is_set("model", "experts", "per_token")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.width", "is not an override"),
        ("--model.width=3", "is not an override"),
        ("model..width=3", "is not an override"),
        ("=3", "is not an override"),
        ("model.width=", "has no value"),
        ("model.width=#3", "has no value"),
        ("model.width=[1", "not valid YAML"),
        ("run.name.x=3", "run.name is a single value"),
        ("data.sources.2.weight=2", "list of 2 elements and has no element 2"),
        ("data.sources.path=c", "has no element path"),
        ("batch.ramp.0.steps=2", "batch.ramp is not a list that the config sets"),
        ("model.0=2", "model is not a list"),
    ],
)
def test_malformed_overrides_are_refused_by_number(tmp_path: Path, override: str, reason: str) -> None:
    path = write(tmp_path, "a.yaml", SOURCES + "run: {name: x}\nmodel: {width: 8}\n")
    with pytest.raises(InputError) as caught:
        load_config(path, ["model.layers=2", override])
    assert caught.value.place.startswith(f"override 2: {override}")
    assert reason in caught.value.reason
    assert caught.value.remedy


def test_the_last_override_wins(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, "a.yaml", SOURCES), ["model.width=8", "model.width=16"])
    assert loaded.config.model.width == 16
    assert loaded.place("model", "width") == "override 2: model.width=16"
