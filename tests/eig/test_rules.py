"""Rules: bounds, types and corrections of their parameters, written here by hand; their names."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from vllm.score.checks import Whole, describe, settings
from vllm.score.eig import (
    RULES,
    SCALERS,
    Decision,
    EIGParameters,
    EntropyThreshold,
    ExpectedInformationGain,
    FixedBudget,
    StoppingRule,
    register_scaler,
)
from vllm.score.eig.rules import find_rule
from vllm.score.errors import ScoreModeError

EIG = "expected_information_gain_reasoning"
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
OF = {row[0]: ExpectedInformationGain for row in TABLE} | {
    "entropy_threshold": EntropyThreshold,
    "fixed_budget": FixedBudget,
}
WHOLE = ["beam_size", "mc_samples", "sample_length", "fixed_budget"]


def check(name: str, value: Any, strict: bool = False) -> Any:
    return getattr(OF[name].checked(strict, **{name: value}), name)


def test_the_built_in_ones_have_nothing_more():
    assert SCALERS is RULES and EIGParameters is ExpectedInformationGain
    shared = {row[0] for row in TABLE} - {"lambda_cost", "mc_samples"}
    assert {name: set(rule.parameters()) for name, rule in RULES.items()} == {
        EIG: {row[0] for row in TABLE} | {"estimator"},
        "entropy_threshold_reasoning": shared | {"entropy_threshold"},
        "fixed_budget_reasoning": shared | {"fixed_budget"},
    }


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
    assert getattr(OF[name](**{name: end}), name) == end


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
    assert f"{name} is {value!r}, and must be a " in record.getMessage()
    assert words[-1] == repr(end)


@pytest.mark.parametrize(("name", "value", "end"), OUTSIDE)
def test_outside_is_refused_in_strict_mode(name, value, end, recwarn):
    with pytest.raises(ScoreModeError) as refused:
        check(name, value, strict=True)
    assert f"{name} must be a " in str(refused.value) and f"got {value!r}" in str(refused.value)
    assert not recwarn.list
    with pytest.raises(ScoreModeError, match=name):
        OF[name](**{name: value})


def test_a_message_names_the_range(caplog, recwarn):
    assert EIGParameters.checked(sample_length=4096).sample_length == 512
    assert caplog.messages == [
        "sample_length is 4096, and must be a whole number from 1 to 512; corrected to 512."
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
    assert "beam_size must be a whole number from 1 to 20, got 99" in message
    assert "top_p must be a number from 0.1 to 1, got 'x'" in message
    assert "ExpectedInformationGain has no mc_sample (did you mean 'mc_samples'?)" in message
    assert "lambda_cost must" not in message


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", list(OF))
@pytest.mark.parametrize(
    "value",
    ["", "many", "1,5", True, False, np.True_, math.nan, "nan", None, [1], 1 + 0j, np.ones(1)],
    ids=repr,
)
def test_what_is_no_number_is_refused(name, value, strict, recwarn):
    with pytest.raises(ScoreModeError, match=f"{name} must be a .*, got"):
        check(name, value, strict)
    assert not recwarn.list


@pytest.mark.parametrize("value", [2.5, "2.5", np.float32(2.5), Fraction(5, 2), math.inf, "1e-3"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_fraction_is_no_whole_number(name, value):
    with pytest.raises(ScoreModeError, match=f"{name} must be a whole number.*, got"):
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


@given(st.sampled_from(sorted(OF)), st.integers() | st.floats(allow_nan=False))
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


def test_parameters_are_the_fields():
    known = Patience.parameters()
    assert known["patience"].description == "steps to take"
    assert describe(known["patience"]) == "a whole number from 1 to 9"
    known = ExpectedInformationGain.parameters()
    assert describe(known["estimator"]) == "one of entropy_difference, mutual_information"
    assert describe(known["top_p"]) == "a number from 0.1 to 1" and known["mc_samples"].default == 5


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        EIGParameters().beam_size = 3  # type: ignore[misc]


@settings
class Patience(StoppingRule):
    """Takes so many steps."""

    patience: Annotated[Whole, Field(ge=1, le=9, description="steps to take")] = 2

    async def decide(self, point: Any) -> Decision:
        return Decision(point.position < self.patience * self.sample_length, "gain")


@pytest.fixture
def own_rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_a_rule_of_one_s_own(own_rules, recwarn):
    assert register_scaler("patient", Patience) is find_rule("patient") is Patience
    found = Patience.checked(patience="30", top_p=0.5)
    assert (found.patience, found.top_p, found.beam_size) == (9, 0.5, 8)
    assert "patience is '30', and must be" in str(recwarn.list[0].message)
    with pytest.raises(ScoreModeError, match="registered already"):
        register_scaler("patient", FixedBudget)
    register_scaler("patient", FixedBudget, replace=True)
    assert find_rule("patient") is FixedBudget


def test_installed_packages_bring_rules(own_rules, tmp_path: Path, monkeypatch):
    (tmp_path / "rule_of_a_user.py").write_text(
        "from vllm.score.eig import FixedBudget\n\n\nclass Own(FixedBudget):\n    pass\n"
    )
    package = tmp_path / "rule_of_a_user-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: rule-of-a-user\nVersion: 1.0\n")
    points = package / "entry_points.txt"
    points.write_text("[vllm_score.rules]\nown = rule_of_a_user:Own\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_rule("own")().fixed_budget == 256 and list(RULES)[-1] == "own"
    points.write_text("[vllm_score.rules]\nother = rule_of_a_user:Other\n")
    with pytest.raises(ScoreModeError, match="'other' of an installed package, rule_of_a_user"):
        find_rule("own")


@pytest.mark.parametrize("wrong", ["expected_information_gain", "fixed_budget", "", 3, "xyz"])
def test_an_unknown_rule_is_refused(wrong):
    with pytest.raises(ScoreModeError, match=f"scaler {wrong!r} is unknown.*{EIG}") as refused:
        find_rule(wrong)
    nearest = {"fixed_budget": "fixed_budget_reasoning", "expected_information_gain": EIG}
    if wrong in nearest:
        assert f"did you mean {nearest[wrong]!r}?" in str(refused.value)


@pytest.mark.parametrize(("name", "kind"), [("debug", bool), ("candidates", str), ("seed", int)])
def test_parameters_are_not_named_like_options(own_rules, name, kind):
    made = type("Own", (Patience,), {"__annotations__": {name: kind}, name: kind()})
    with pytest.raises(ScoreModeError, match=f"names its parameters {name} like options"):
        register_scaler("wrong", settings(made))
    assert "wrong" not in RULES


@pytest.mark.parametrize("wrong", [3, print, "json:dumps", EIGParameters()])
def test_what_is_no_rule_is_refused(own_rules, wrong):
    with pytest.raises(ScoreModeError, match="give a subclass of StoppingRule"):
        register_scaler("wrong", wrong)
    assert "wrong" not in RULES
