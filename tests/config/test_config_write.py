"""Derived values, YAML text, digests and differences of configs of every shape."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import BatchStage, Config, Experts, Model, Node, Schedule, Source
from megascale.config.write import difference, digest, dump

SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8)
PLAIN = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3), max_leaves=6
)
"""What a section without a schema may hold."""


def values(annotation: Any, limits: dict[str, float]) -> st.SearchStrategy[Any]:
    """Anything that a field of the schema takes."""
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(int(limits.get("ge", limits.get("gt", -1) + 1)), int(limits.get("le", 2**40)))
    if annotation is float:
        low = limits.get("ge", limits.get("gt", -1e30))
        high = limits.get("le", limits.get("lt", 1e30))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    if annotation is str:
        return st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z") if "pattern" in limits else st.text(max_size=8)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return st.none() | values(next(kind for kind in get_args(annotation) if kind is not type(None)), limits)
    if get_origin(annotation) is tuple:
        first, *rest = get_args(annotation)
        length = (int(limits.get("min_length", 0)), 3) if rest == [Ellipsis] else (2, 2)
        return st.lists(values(first, {}), min_size=length[0], max_size=length[1]).map(tuple)
    if get_origin(annotation) is dict:
        return st.dictionaries(st.text(max_size=8), PLAIN, max_size=3)
    assert issubclass(annotation, Node)
    return nodes(annotation)


def nodes(kind: type[Node]) -> st.SearchStrategy[Any]:
    """A node with any of its settings changed."""
    names = ("gt", "ge", "lt", "le", "pattern", "min_length")
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in kind.model_fields.items():
        pairs = ((limit, key) for limit in field.metadata for key in names)
        limits = {key: getattr(limit, key) for limit, key in pairs if getattr(limit, key, None) is not None}
        fields[name] = values(field.annotation, limits)
    required = {name: strategy for name, strategy in fields.items() if kind.model_fields[name].is_required()}
    optional = {name: strategy for name, strategy in fields.items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda chosen: kind(**chosen))


CONFIGS = nodes(Config)


def read(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.booleans())
def test_any_config_is_read_back_as_it_was_written(config: Config, comments: bool) -> None:
    assert read(dump(config, comments)).config == config


@settings(max_examples=100)
@given(
    st.text()
    | st.sampled_from(["no", "1e-4", "null", "", "~", "#x", "a: b", "- a", "12:30", "true", "1_0", "'", '"', "\x85", "é😀"])
)
def test_any_text_is_read_back_as_it_was_written(text: str) -> None:
    config = Config.model_validate({"run": {"folder": text}, "observe": {"wandb": {"tags": (text, "x")}}})
    assert read(dump(config)).config == config


def test_comments_say_what_each_setting_means() -> None:
    text = dump(Config())
    assert "\nmodel:\n" in text
    assert "  width: 256  # d, width of the residual (of one block)\n" in text
    assert "# " not in dump(Config(), comments=False)


def test_settings_without_effect_are_not_written_as_set() -> None:
    assert "    # per_token: 1  # k, experts each token is sent to; no effect: model.experts.count is 1\n" in dump(Config())
    assert "per_token" not in dump(Config(), comments=False)
    assert "per_token: 1" in dump(Config(model=Model(experts=Experts(count=2))), comments=False)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(model=Model(experts=Experts(count=4)), schedule=Schedule(shape="wsd")),
        Config(schedule=Schedule(shape="constant")),
    ],
)
def test_a_written_config_passes_the_checks_it_passed_before(config: Config) -> None:
    assert check(read(dump(config))) == []
    assert check(read(dump(resolve(config)))) == []


def test_derived_values_are_filled_in() -> None:
    model = resolve(Config(model=Model(width=256, heads=8))).model
    assert (model.kv_heads, model.head_dim, model.ffn_width) == (8, 32, 704)
    assert model.vocab_size is None
    assert model.experts.width is None
    assert resolve(Config(model=Model(experts=Experts(count=2)))).model.experts.width == 704
    assert resolve(Config(schedule=Schedule(shape="wsd"))).schedule.decay_steps == 200
    assert resolve(Config(schedule=Schedule(shape="wsd", steps=3, warmup_steps=0))).schedule.decay_steps == 1
    assert resolve(Config()).schedule.decay_steps is None


@given(st.integers(1, 2000))
def test_the_feed_forward_is_the_least_multiple_of_64_that_holds_8_thirds(width: int) -> None:
    ffn_width = resolve(Config(model=Model(width=width, heads=1))).model.ffn_width
    assert ffn_width is not None
    assert ffn_width % 64 == 0
    assert 3 * (ffn_width - 64) < 8 * width <= 3 * ffn_width


def test_what_was_set_is_not_derived() -> None:
    model = Model(heads=4, kv_heads=2, head_dim=10, ffn_width=7, experts=Experts(count=2, width=5, balance_loss=0.5))
    resolved = resolve(Config(model=model, schedule=Schedule(shape="wsd", decay_steps=3)))
    assert resolved.model == model
    assert resolved.schedule.decay_steps == 3
    assert resolve(resolved) == resolved


def test_a_width_that_heads_do_not_divide_cannot_be_resolved() -> None:
    with pytest.raises(InputError, match="width 256 is not a multiple of heads 3"):
        resolve(Config(model=Model(heads=3)))


SAME_RESULT = [
    ("run", "name", "other"),
    ("run", "folder", "elsewhere"),
    ("parallel", "dp", 2),
    ("checkpoint", "every", 7),
    ("guard", "timeout_seconds", 5.0),
    ("observe", "console_every", 3),
    ("profile", "steps", (1, 2)),
    ("validation", "every", 3),
    ("model", "kv_heads", 4),
]
OTHER_RESULT = [
    ("run", "seed", 2),
    ("model", "width", 512),
    ("data", "sources", (Source(path="other"),)),
    ("batch", "ramp", (BatchStage(steps=1, sequences=2),)),
    ("optimizer", "lr", 1e-3),
    ("schedule", "steps", 999),
    ("start", "model", "runs/other"),
]


def changed(section: str, name: str, value: Any) -> Config:
    part = getattr(Config(), section)
    return Config().model_copy(update={section: part.model_copy(update={name: value})})


@pytest.mark.parametrize(("section", "name", "value"), SAME_RESULT)
def test_the_digest_ignores_what_does_not_decide_the_result(section: str, name: str, value: Any) -> None:
    assert digest(changed(section, name, value)) == digest(Config())


@pytest.mark.parametrize(("section", "name", "value"), OTHER_RESULT)
def test_the_digest_changes_with_what_decides_the_result(section: str, name: str, value: Any) -> None:
    assert digest(changed(section, name, value)) != digest(Config())
    assert digest(Config().model_copy(update={"precision": "bf16"})) != digest(Config())
    assert digest(Config().model_copy(update={"compile": "off"})) == digest(Config())


@settings(max_examples=40, deadline=None)
@given(CONFIGS, CONFIGS)
def test_configs_differ_exactly_where_the_difference_says(first: Config, second: Config) -> None:
    rows = difference(first, second)
    assert bool(rows) == (first != second)
    assert difference(first, first) == []
    assert [(path, other, one) for path, one, other in rows] == difference(second, first)


def test_the_difference_names_settings_by_their_path() -> None:
    first = Config(model=Model(width=8), batch=Config().batch)
    second = changed("batch", "ramp", (BatchStage(steps=1, sequences=2),))
    assert difference(first, second) == [("model.width", 8, 256), ("batch.ramp", [], [{"steps": 1, "sequences": 2}])]
    assert difference(Config(), changed("optimizer", "betas", (0.9, 0.5))) == [("optimizer.betas.1", 0.95, 0.5)]
