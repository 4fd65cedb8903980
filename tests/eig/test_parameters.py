"""Bounds, types and corrections; what is expected is written here by hand."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.eig.parameters import (
    BOUNDS,
    RIVAL_BOUNDS,
    Bound,
    EIGParameters,
    check_values,
)
from vllm.score.errors import ScoreModeError

# name, default, low, high, just below low, just above high
TABLE = [
    ("lambda_cost", 0.05, 0.0, 10.0, -5e-324, 10.000000000000002),
    ("beam_size", 8, 1, 20, 0, 21),
    ("mc_samples", 5, 1, 20, 0, 21),
    ("sample_length", 64, 1, 512, 0, 513),
    ("temperature", 1.0, 0.1, 2.0, 0.09999999999999999, 2.0000000000000004),
    ("top_p", 0.9, 0.1, 1.0, 0.09999999999999999, 1.0000000000000002),
    ("max_computation_time", 30.0, 1.0, 300.0, 0.9999999999999999, 300.00000000000006),
]
RIVALS = [
    ("entropy_threshold", 0.5, 0.0, 10.0, -5e-324, 10.000000000000002),
    ("fixed_budget", 256, 0, 1_000_000, -1, 1_000_001),
]
EVERY = {**BOUNDS, **RIVAL_BOUNDS}
WHOLE = ["beam_size", "mc_samples", "sample_length", "fixed_budget"]


def check(name: str, value: Any, strict: bool = False) -> Any:
    return check_values({name: value}, EVERY, strict=strict)[name]


def test_the_tables_have_nothing_more():
    assert list(BOUNDS) == [row[0] for row in TABLE]
    assert list(RIVAL_BOUNDS) == [row[0] for row in RIVALS]
    assert [field.name for field in fields(EIGParameters)] == [row[0] for row in TABLE]


@pytest.mark.parametrize(("name", "default"), [row[:2] for row in TABLE])
def test_defaults(name, default):
    value = getattr(EIGParameters(), name)
    assert value == default and type(value) is type(default)
    assert EIGParameters.checked() == EIGParameters()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("name", "end"), [(row[0], end) for row in TABLE + RIVALS for end in row[2:4]]
)
def test_both_ends_are_allowed(name, end, strict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = check(name, end, strict)
    assert value == end and type(value) is type(end)
    if name in BOUNDS:
        assert getattr(EIGParameters(**{name: end}), name) == end
        assert getattr(EIGParameters.checked(strict, **{name: end}), name) == end


OUTSIDE = [
    (row[0], value, end)
    for row in TABLE + RIVALS
    for value, end in ((row[4], row[2]), (row[5], row[3]))
]


@pytest.mark.parametrize(("name", "value", "end"), OUTSIDE)
def test_outside_is_corrected_with_one_warning(name, value, end, caplog, recwarn):
    with caplog.at_level(logging.WARNING, "vllm_score.eig"):
        corrected = check(name, value)
    assert corrected == end and type(corrected) is type(end)
    (warned,) = recwarn.list
    (record,) = caplog.records
    assert warned.category is RuntimeWarning
    assert warned.filename == __file__
    assert record.levelno == logging.WARNING and record.name == "vllm_score.eig"
    assert str(warned.message) == record.getMessage()
    words = record.getMessage().rstrip(".").split()
    assert words[0] == name
    assert f"{name} is {value!r}," in record.getMessage()
    assert words[-1] == repr(end)


@pytest.mark.parametrize(("name", "value", "end"), OUTSIDE)
def test_outside_is_refused_in_strict_mode(name, value, end, recwarn):
    with pytest.raises(ScoreModeError) as refused:
        check(name, value, strict=True)
    assert f"{name} is {value!r}, out of range" in str(refused.value)
    assert not recwarn.list
    if name in BOUNDS:
        with pytest.raises(ScoreModeError, match=name):
            EIGParameters.checked(strict=True, **{name: value})
        with pytest.raises(ScoreModeError, match=name):
            EIGParameters(**{name: value})


def test_a_message_names_the_range(caplog, recwarn):
    assert EIGParameters.checked(sample_length=4096).sample_length == 512
    assert caplog.messages == [
        "sample_length is 4096, out of its range 1 to 512; corrected to 512."
    ]
    assert check("fixed_budget", 2e6) == 1_000_000
    assert "0 to 1,000,000" in caplog.messages[1]


def test_each_parameter_corrected_has_its_warning(recwarn):
    found = EIGParameters.checked(beam_size=99, top_p=0, mc_samples=3)
    assert (found.beam_size, found.top_p, found.mc_samples) == (20, 0.1, 3)
    assert [str(each.message).split()[0] for each in recwarn.list] == ["beam_size", "top_p"]


def test_strict_mode_lists_everything():
    with pytest.raises(ScoreModeError) as refused:
        EIGParameters.checked(strict=True, beam_size=99, top_p="x", lambda_cost=1, mc_sample=3)
    message = str(refused.value)
    assert "beam_size is 99" in message and "top_p is 'x'" in message
    assert "mc_sample is no parameter, did you mean 'mc_samples'?" in message
    assert "lambda_cost" not in message


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", list(EVERY))
@pytest.mark.parametrize(
    "value",
    ["", "many", "1,5", True, False, np.True_, math.nan, "nan", None, [1], 1 + 0j, np.ones(1)],
    ids=repr,
)
def test_what_is_no_number_is_refused(name, value, strict, recwarn):
    with pytest.raises(ScoreModeError, match=f"{name} is .*, set a"):
        check(name, value, strict)
    assert not recwarn.list


@pytest.mark.parametrize("value", [2.5, "2.5", np.float32(2.5), Fraction(5, 2), math.inf, "1e-3"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_fraction_is_no_whole_number(name, value):
    with pytest.raises(ScoreModeError, match=f"{name} is .*, set a whole number"):
        check(name, value)


@pytest.mark.parametrize("value", [8, 8.0, "8", " 8 ", "8.0", "8e0", np.int64(8), np.float32(8)])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_as_command_lines_hand_them_on(name, value):
    found = check(name, value, strict=True)
    assert found == 8 and type(found) is int


@pytest.mark.parametrize("value", [0.5, "0.5", "5e-1", ".5", np.float32(0.5), Fraction(1, 2)])
@pytest.mark.parametrize("name", ["lambda_cost", "temperature", "top_p", "entropy_threshold"])
def test_numbers_as_command_lines_hand_them_on(name, value):
    found = check(name, value, strict=True)
    assert found == 0.5 and type(found) is float


@pytest.mark.parametrize(
    "huge", [math.inf, "inf", "1e999", 10**400, "1e300"], ids=lambda v: str(v)[:9]
)
def test_huge_is_out_of_range(huge, recwarn):
    assert check("max_computation_time", huge) == 300.0
    assert check("lambda_cost", -math.inf) == 0.0
    assert check("beam_size", 10**400) == 20


@given(st.sampled_from(sorted(EVERY)), st.integers() | st.floats(allow_nan=False))
def test_what_comes_out_is_the_nearest_value_allowed(name, value):
    low, high = next(row[2:4] for row in TABLE + RIVALS if row[0] == name)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = check(name, value)
        except ScoreModeError:
            assert name in WHOLE and not float(value).is_integer()
            return
    assert low <= found <= high
    inside = low <= value <= high
    assert found == (value if inside else low if value < low else high)
    assert len(warned) == (not inside)


def test_help_reads_the_table():
    assert BOUNDS["lambda_cost"].help.endswith("; 0 to 10")
    assert BOUNDS["top_p"].range == "0.1 to 1"
    assert "tokens" in BOUNDS["sample_length"].help


@pytest.mark.parametrize(
    ("kind", "default", "low", "high", "named"),
    [
        (float, 2.0, 0.0, 1.0, "default"),
        (float, 0.5, math.nan, 1, "default"),
        (str, 1, 0, 2, "kind"),
    ],
)
def test_an_impossible_bound_is_refused(kind, default, low, high, named):
    with pytest.raises(ScoreModeError, match=named):
        Bound(kind, default, low, high, "none")


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        EIGParameters().beam_size = 3  # type: ignore[misc]
