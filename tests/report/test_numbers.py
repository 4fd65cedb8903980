"""Numbers and characters as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.report.table import PART, head, significant, tail, visible, visible_token


@given(st.floats(1e-3, 1e300), st.integers(3, 6))
def test_close_to_the_value(value, digits):
    # Below 1 the four places after the point decide.
    assert float(significant(value, digits)) == pytest.approx(
        value, rel=0.51 * 10 ** (1 - digits), abs=0.51e-4
    )


@given(st.floats(1e-3, 1e300), st.integers(3, 6))
def test_short_enough_for_a_column(value, digits):
    assert len(significant(value, digits)) <= 12


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.0])
def test_special_values(value):
    assert float(significant(value)) == value


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (26.48123, 6, "26.4812"),
        (0.01234, 3, "0.0123"),
        (1070.4, 3, "1070"),
        (2.5e-5, 3, "2.50e-05"),
    ],
)
def test_examples(value, digits, text):
    assert significant(value, digits) == text


@given(st.text())
def test_nothing_breaks_the_line_and_nothing_is_lost(text):
    shown = visible(text)
    assert shown.isprintable()
    assert len(shown) >= len(text)
    assert [char for char in text if char.isprintable()] == [
        char for char in text if char.isprintable() and char in shown
    ]


def test_spaces_of_a_token_are_marked():
    assert visible_token(" a\n", 7) == "␣a↵"
    assert visible(" a\n") == " a↵"


def test_what_a_font_lacks_is_escaped():
    assert visible("a漢😀", drawable=str.isascii) == "a\\u6f22\\U0001f600"


def test_tokens_without_characters_of_their_own():
    assert visible_token("", 7) == PART
    assert visible_token(None, 7) == "[7]"


@given(st.text(), st.integers(2, 20))
def test_cut_to_a_width(text, width):
    beginning, end = head(text, width), tail(text, width)
    if len(text) <= width:
        assert beginning == end == text
    else:
        assert len(beginning) == len(end) == width
        assert beginning[-1] == end[0] == "…"
        assert text.startswith(beginning[:-1]) and text.endswith(end[1:])
