"""What people type for labels, ages and sweeps: understood, or refused in one sentence, whatever it is."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_core.errors import ConfigError
from distill_core.recipe import parse_overrides
from distillery_cli.terminal.parsing import parse_age, parse_labels, parse_moment, split_sweep


def test_several_values_make_a_sweep_and_one_value_does_not():
    single, axes = split_sweep(["steps=5", "optim.student.lr=1e-4, 3e-4", "seed=1,2,3"])
    assert single == ["steps=5"]
    assert axes == {"optim.student.lr": ["1e-4", "3e-4"], "seed": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=[1,2]", None),
        ("k=[1,2],[3]", ["[1,2]", "[3]"]),
        ('k="a, b"', None),
        ('k="a, b","c"', ['"a, b"', '"c"']),
        ("k={a=1,b=2},{a=2}", ["{a=1,b=2}", "{a=2}"]),
        ("k=edm-digits@1,edm-digits@prod", ["edm-digits@1", "edm-digits@prod"]),
        (r'k="a\",b","c"', [r'"a\",b"', '"c"']),
        (r'k="a\\","b"', [r'"a\\"', '"b"']),
        ("k=true,false", ["true", "false"]),
    ],
)
def test_commas_inside_brackets_and_quotes_do_not_separate(text, values):
    single, axes = split_sweep([text])
    assert (single, axes) == (([text], {}) if values is None else ([], {"k": values}))


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["title=a cat, on a mat"], "in quotes"),
        (["lr=1e-4,"], "no value of a sweep"),
        (["lr=,1e-4"], "no value of a sweep"),
        (["lr=1e-4,[1"], "no value of a sweep"),
        (["lr=1,2", "lr=3,4"], "given twice"),
    ],
)
def test_a_sweep_that_could_be_a_mistake_is_refused(items, said):
    with pytest.raises(ConfigError, match=said):
        split_sweep(items)


@pytest.mark.slow
@given(st.lists(st.text(max_size=40), max_size=4))
def test_any_overrides_are_a_sweep_or_one_sentence(items):
    try:
        single, axes = split_sweep(items)
    except ConfigError:
        return
    assert len(single) + len(axes) == len(items)
    assert all(len(values) > 1 for values in axes.values())


_VALUES = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.booleans().map(lambda value: str(value).lower()),
    st.from_regex(r"[a-z][a-z0-9_.-]{0,10}", fullmatch=True),
    st.text(st.characters(codec="ascii", exclude_characters='\\"'), max_size=10)
    .filter(str.isprintable)
    .map(lambda text: f'"{text}"'),
    st.lists(st.integers(0, 9), max_size=3).map(str),
)


@given(st.lists(_VALUES, min_size=2, max_size=5))
def test_the_values_of_a_sweep_come_out_as_they_went_in(values):
    _, axes = split_sweep([f"key={','.join(values)}"])
    assert axes == {"key": values}
    for value in values:
        assert parse_overrides([f"key={value}"]).keys() == {"key"}


@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_labels_are_labels_or_one_sentence(items):
    try:
        labels = parse_labels(items)
    except ConfigError:
        return
    assert sorted(f"{key}={value}" for key, value in labels.items()) == sorted(items)


@given(st.text(max_size=20))
def test_any_age_is_a_number_of_seconds_or_one_sentence(text):
    with contextlib.suppress(ConfigError):
        assert parse_age(text, "older-than") >= 0


@given(st.text(max_size=20))
def test_any_moment_is_a_time_or_one_sentence(text):
    try:
        moment = parse_moment(text, "since")
    except ConfigError:
        return
    assert moment is None or moment.tzinfo is UTC


def test_ages_and_dates():
    assert [parse_age(text, "age") for text in ("90s", "1.5h", "30d")] == [90.0, 5400.0, 30 * 86_400.0]
    assert parse_moment("2026-05-31T08:00+02:00", "since") == datetime(2026, 5, 31, 6, tzinfo=UTC)
    assert abs(parse_moment("2d", "since") - (datetime.now(UTC) - timedelta(days=2))) < timedelta(seconds=5)
    assert parse_moment("", "since") is None
