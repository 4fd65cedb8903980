"""Checks of values, ranges and names."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import Field

from vllm.score.checks import (
    Count,
    Flag,
    Fraction,
    Number,
    Seed,
    Whole,
    check,
    check_name,
    describe,
    settings,
)
from vllm.score.errors import ScoreModeError


@settings
class Sampling:
    top_p: Fraction = 0.9
    length: Annotated[Whole, Field(ge=0, le=20, description="length, tokens")] = 4
    greedy: Flag = False
    seed: Seed | None = None
    order: Literal["first", "last"] = "first"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, [1, np.int64(3), 2**70], [0, -1, True, 1.0, "1", None, float("nan")]),
        (Whole, [0, -5, np.uint8(3)], [False, 0.5, "0"]),
        (Number, [0, -1.5, np.float32(2), np.int32(1)], ["1", True, float("nan"), float("inf")]),
        (Fraction, [1, 0.1], [0, 1.01, float("nan")]),
        (Seed | None, [None, 0, 2**63 - 1], [-1, 2**63, 0.0, True]),
        (Flag, [True, False], [0, 1, "yes", None]),
        (Literal["a", "b"], ["a"], ["A", None]),
    ],
)
def test_values_of_a_kind_pass_and_others_are_named(kind, good, bad) -> None:
    for value in good:
        assert check("field", value, kind) == value
    for value in bad:
        with pytest.raises(ScoreModeError) as error:
            check("field", value, kind, "leave it out")
        assert str(error.value) == f"field must be {describe(kind)}, got {value!r}; leave it out."


def test_kinds_in_words() -> None:
    assert describe(Count) == "a whole number of at least 1"
    assert describe(Fraction) == "a number above 0 and of at most 1"
    assert describe(Seed | None) == "a whole number of at least 0 and below 2**63 or None"
    assert describe(Annotated[Whole, Field(ge=1, le=20)]) == "a whole number from 1 to 20"
    assert describe(Literal["a", "b"]) == "one of a, b"


def test_settings_take_plain_python_numbers() -> None:
    made = Sampling(length=np.int16(7), top_p=1)
    assert (made.length, made.top_p) == (7, 1.0)
    assert type(made.length) is int and type(made.top_p) is float


def test_settings_say_all_that_is_wrong() -> None:
    with pytest.raises(ScoreModeError) as error:
        Sampling(top_p=2, length=21, lenght=3, order="middle")
    assert str(error.value) == (
        "top_p must be a number above 0 and of at most 1, got 2; length must be a whole number "
        "from 0 to 20, got 21; order must be one of first, last, got 'middle'; Sampling has no "
        "lenght (did you mean 'length'?); there are top_p, length, greedy, seed, order."
    )


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ScoreModeError, match=r"got \[0, 0, [0, ]+\.\.\.\.$"):
        check("field", [0] * 10_000, Count)


def test_unknown_names_have_a_neighbour() -> None:
    check_name("statistic", "entropy", ["entropy", "mean"])
    with pytest.raises(ScoreModeError, match=r"statistic 'entrpy' is unknown \(did you mean 'entr"):
        check_name("statistic", "entrpy", ["entropy", "mean"])
    with pytest.raises(ScoreModeError, match=r"statistic 'x' is unknown; there are entropy, mean"):
        check_name("statistic", "x", ["entropy", "mean"])
