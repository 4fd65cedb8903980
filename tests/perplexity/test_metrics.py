from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.metrics import (
    METRICS,
    PlanTotals,
    TextCounter,
    check_logprobs,
    metric_value,
)
from vllm.score.perplexity.windows import ScoringPlan, SlidingWindows, Window


def test_a_metric_of_each_kind_by_hand() -> None:
    # Three tokens of probability 1/2, 1/4, 1/8: six bits in all.
    loss = -float(np.sum(np.log(np.array([0.5, 0.25, 0.125]))))
    by_hand = {
        "nll": (3, 2 * math.log(2)),
        "token_perplexity": (3, 4),
        "bits_per_token": (3, 2),
        "word_perplexity": (2, 8),
        "byte_perplexity": (6, 2),
        "bits_per_byte": (12, 0.5),
    }
    assert by_hand.keys() == METRICS.keys()
    for name, (count, value) in by_hand.items():
        assert metric_value(name, loss, count) == pytest.approx(value)


def totals_of(logprobs: np.ndarray) -> PlanTotals:
    """Of one window of which all tokens but the first are scored."""
    totals = PlanTotals(ScoringPlan(SlidingWindows(logprobs.size + 1, logprobs.size)))
    window = Window(0, 0, [0] * (logprobs.size + 1), logprobs.size, 1, None)
    totals.add([window], logprobs)
    return totals


def test_sums_are_float64() -> None:
    # In float32 a sum of 2^24 stops growing by 0.5.
    assert totals_of(np.full(1 << 25, -0.5, dtype=np.float32)).loss == 1 << 24


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_divide_by_is_an_error(name: str) -> None:
    with pytest.raises(ScoreModeError, match="is 0: there is nothing to average over"):
        metric_value(name, 1.0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.01])
def test_impossible_values_are_errors(value: float) -> None:
    with pytest.raises(ScoreModeError, match=r"logprobs\[1\] is .*1 of 3 values"):
        check_logprobs(np.array([-1.0, value, -2.0], dtype=np.float32))


def test_rounding_above_zero_passes() -> None:
    assert totals_of(np.array([1e-6], dtype=np.float32)).loss == pytest.approx(-1e-6)


def test_beyond_float64_is_infinite() -> None:
    assert metric_value("token_perplexity", 1000.0, 1) == math.inf


@given(
    st.lists(
        st.lists(st.text(st.sampled_from("ab \n\té\u2003漢😀"), max_size=6), max_size=5), max_size=5
    )
)
def test_text_counter_is_lm_evals_count(documents: list[list[str]]) -> None:
    counter = TextCounter()
    for pieces in documents:
        counter.start_document()
        for piece in pieces:
            counter.feed(piece)
    whole = ["".join(pieces) for pieces in documents]
    assert counter.words == sum(len(re.split(r"\s+", text)) for text in whole)
    assert counter.bytes == sum(len(text.encode("utf-8")) for text in whole)
