from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.eig.options import ContinuationPrompts
from vllm.score.errors import ScoreModeError

OWN = ContinuationPrompts(large="L", moderate="M", small="S", neutral="N")


@pytest.mark.parametrize(
    ("gain", "cost", "text"),
    [
        (0.31, 0.1, "L"),
        (0.29, 0.1, "M"),
        (0.16, 0.1, "M"),
        (0.14, 0.1, "S"),
        (3.0, 1.0, "M"),
        (1.5, 1.0, "S"),
        (-1.0, 1.0, "S"),
        (0.51, 0.0, "L"),
        (0.5, 0.0, "M"),
        (0.1, 0.0, "S"),
        (0.0, 0.0, "S"),
        (math.inf, 0.0, "L"),
    ],
)
def test_the_text_for_a_gain(gain, cost, text):
    assert OWN.choose(gain, cost) == text


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 10))
def test_a_larger_gain_never_gets_a_smaller_text(a, b, cost):
    sizes = "SML"
    low, high = sorted([a, b])
    assert sizes.index(OWN.choose(low, cost)) <= sizes.index(OWN.choose(high, cost))


def test_own_bounds():
    prompts = ContinuationPrompts(large="L", moderate="M", small="S", large_ratio=2, large_nats=9)
    assert prompts.choose(2.5, 1) == "L"
    assert prompts.choose(8, 0) == "M"


def test_the_texts_differ():
    prompts = ContinuationPrompts()
    assert len({prompts.large, prompts.moderate, prompts.small, prompts.neutral}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"large": ""}, "large is ''; give a text"),
        ({"neutral": "\n"}, r"neutral is '\\n'; give a text"),
        ({"small": 3}, "small is 3; give a text"),
        ({"large_ratio": 1.5}, "large_ratio is 1.5 and moderate_ratio is 1.5"),
        ({"moderate_nats": 0.0}, "moderate_nats is 0.0"),
        ({"large_nats": math.inf}, "large_nats is inf"),
        ({"large_ratio": math.nan}, "large_ratio is nan"),
    ],
)
def test_prompts_that_cannot_be_used(options, message):
    with pytest.raises(ScoreModeError, match=message):
        ContinuationPrompts(**options)


def test_gains_and_costs_that_cannot_be_used():
    with pytest.raises(ScoreModeError, match="gain is NaN"):
        OWN.choose(math.nan, 0.1)
    for cost in (-0.1, math.inf, math.nan):
        with pytest.raises(ScoreModeError, match=f"lambda_cost is {cost}"):
            OWN.choose(1, cost)
