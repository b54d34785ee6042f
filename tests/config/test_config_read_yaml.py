"""YAML as YAML 1.2 reads it, with lines, and without anything that could surprise or run."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config.errors import InputError
from megascale.config.read_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("+1E3", 1000.0),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("TRUE", True),
        ("false", False),
        ("12:30:00", "12:30:00"),
        ("2001-01-01", "2001-01-01"),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("~", None),
        ("", None),
        ("'no'", "no"),
        ("'1'", "1"),
        ("=", "="),
        ("!!str 1", "1"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    read = parse_yaml(f"a: {text}", "x.yaml").value["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3", "a is set twice, first on line 1"),
        ("m:\n  a: 1\n  a: 1", "x.yaml:3", "m.a is set twice, first on line 2"),
        ("a: !!python/object/apply:os.system ['true']", "x.yaml:1", "tag python/object/apply:os.system is refused"),
        ("a: !!set {b}", "x.yaml:1", "tag set is refused"),
        ("a: !!int many", "x.yaml:1", "tagged as int"),
        ("m:\n\ta: 1", "x.yaml:2", "cannot start any token"),
        ("a: &x 1\nb: *x", "x.yaml:2", "aliases"),
        ("<<: {a: 1}", "x.yaml:1", "merge keys"),
        ("1: a", "x.yaml:1", "1 is not a name"),
        ("[a]: b", "x.yaml:1", "a list or mapping is not a name"),
        ("a: 1\n---\na: 2", "x.yaml:2", "another document"),
        ("a: [1, 2", "x.yaml:1", "not valid YAML"),
        ("a: " + "[" * 40 + "]" * 40, "x.yaml:1", "levels deep"),
        ("a: " + "[" * 9000, "x.yaml", "levels deep"),
        ("a: 9223372036854775808", "x.yaml:1", "does not fit 64 bits"),
        ("a: " + "9" * 9000, "x.yaml:1", "does not fit 64 bits"),
        ('a: "\\ud800"', "x.yaml:1", "surrogate"),
        ('a: "\\UFFFFFFFF"', "x.yaml", "escape"),
        ("a: \x01", "x.yaml", "special characters"),
    ],
)
def test_surprises_are_refused_with_their_line(text: str, place: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "x.yaml")
    assert caught.value.place == place
    assert reason in caught.value.reason
    assert caught.value.remedy


def test_tabs_get_a_remedy_of_their_own() -> None:
    with pytest.raises(InputError, match="never with tabs"):
        parse_yaml("a:\n\tb: 1", "x.yaml")


def test_every_key_and_element_has_its_line() -> None:
    document = parse_yaml("# first\na:\n  b: 1\n  c:\n  - 2\n  - d: 3\n", "x.yaml")
    assert document.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1): 6,
        ("a", "c", 1, "d"): 6,
    }


@pytest.mark.parametrize("text", ["", "   \n", "# only a comment\n"])
def test_nothing_is_told_from_null(text: str) -> None:
    assert parse_yaml(text, "x.yaml").empty
    assert not parse_yaml("null", "x.yaml").empty


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_with_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        parse_yaml(text, "x.yaml")
