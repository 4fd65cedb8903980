"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.report.numbers import significant


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
