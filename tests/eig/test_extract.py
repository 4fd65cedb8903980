from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.eig.extract import find_boxed, find_numbers, find_pattern, normalise


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("no digits", []),
        ("It is 3.", ["3"]),
        ("3.5.", ["3.5"]),
        ("3. Then 4", ["3", "4"]),
        (".5 of it", ["0.5"]),
        ("1,000 and 12,345,678.90", ["1000", "12345678.9"]),
        ("1,2,3 and 1,0000", ["1", "2", "3", "1", "0"]),
        ("$1,250.00, or -$5", ["1250", "-5"]),
        (r"\$3 and $-7$", ["3", "-7"]),
        ("-4 − 5 but −6", ["-4", "5", "-6"]),
        ("7-5=2, (3)-1", ["7", "5", "2", "3", "1"]),
        ("1/2 and -3/4", ["1/2", "-3/4"]),
        ("on 12/25/2026", ["12", "25", "2026"]),
        ("50% of 12kg", ["50", "12"]),
        ("1e5 and 2.5E-3", ["1e5", "2.5E-3"]),
        ("x2 = 4", ["4"]),
        ("007", ["7"]),
        ("-0.0", ["0"]),
    ],
)
def test_numbers(text, numbers):
    assert [found.answer for found in find_numbers(text)] == numbers


@given(st.decimals(-(10**9), 10**9, places=3), st.booleans(), st.sampled_from(["", ".", "%", "!"]))
def test_a_number_is_found_however_it_is_written(value, commas, behind):
    written = f"{value:,}" if commas else str(value)
    (found,) = find_numbers(f"so it is {written}{behind}")
    assert Decimal(found.answer) == value
    assert found.answer == normalise(written)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"so \boxed{42}.", ["42"]),
        (r"\boxed{\frac{1}{2}} or \fbox {x}", [r"\frac{1}{2}", "x"]),
        (r"\boxed{1,000} and \boxed{5.0}", ["1000", "5"]),
        (r"\boxed{\boxed{3}}", ["3"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{} \boxed{ } \boxed{7", []),
        (r"\boxed{7 \boxed{8}", ["8"]),
        (r"\boxed{ a  b }", ["a b"]),
    ],
)
def test_boxes(text, boxes):
    assert [found.answer for found in find_boxed(text)] == boxes


@st.composite
def _balanced(draw, depth=3):
    parts = st.sampled_from(["a", "+", r"\{", r"\}", "x"])
    if depth:
        parts = parts | _balanced(depth - 1).map(lambda inner: "{" + inner + "}")
    return "".join(draw(st.lists(parts, min_size=1, max_size=4)))


@given(_balanced())
def test_balanced_braces(inner):
    (found,) = find_boxed(rf"{{ \boxed{{{inner}}} }}")
    assert found.answer == inner


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("1,000", "1000"),
        ("5.0", "5"),
        (" $12 ", "12"),
        (r"\$12", "12"),
        ("$x + 1$", "x + 1"),
        ("12 %", "12"),
        (r"12\%", "12"),
        ("-3.10", "-3.1"),
        ("−3", "-3"),
        ("12.", "12"),
        ("yes.", "yes."),
        ("  New \n York ", "New York"),
        ("1,00", "1,00"),
        ("1/2", "1/2"),
        (".", "."),
        ("-", "-"),
        ("", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@given(st.text(st.sampled_from("0123456789.,-$%\\ ab/"), max_size=8))
def test_what_is_normal_stays(text):
    once = normalise(text)
    assert normalise(once) == once


@pytest.mark.parametrize("text", ["12 and 3.", "12 and 3,0", "12 and 34", "12 and 3/", "12 and 3e"])
def test_numbers_that_may_go_on(text):
    found = find_numbers(text)
    assert not found[0].open and all(f.open for f in found[1:])
    closed = find_numbers(text + " ")
    assert len(closed) == len(found) and not any(f.open for f in closed)


def test_places():
    assert [f.end for f in find_numbers("a 12, 3")] == [4, 7]
    (box,) = find_boxed(r"\boxed{1}")
    assert (box.end, box.open) == (9, False)


def test_patterns():
    whole = find_pattern("A or B", re.compile("[AB]"))
    assert [(f.answer, f.end, f.open) for f in whole] == [("A", 1, False), ("B", 6, True)]
    group = find_pattern("key: 5.0; key: ;", re.compile(r"key: (\S*);"))
    assert [f.answer for f in group] == ["5"]
