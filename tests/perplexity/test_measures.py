from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import measures


def test_a_figure_of_each_kind_by_hand() -> None:
    # Three tokens of probability 1/2, 1/4, 1/8: six bits in all.
    total = measures.logprob_sum(np.log(np.array([0.5, 0.25, 0.125])))
    assert measures.nll(total, 3) == pytest.approx(2 * math.log(2))
    assert measures.token_perplexity(total, 3) == pytest.approx(4)
    assert measures.bits_per_token(total, 3) == pytest.approx(2)
    assert measures.word_perplexity(total, 2) == pytest.approx(8)
    assert measures.byte_perplexity(total, 6) == pytest.approx(2)
    assert measures.bits_per_byte(total, 12) == pytest.approx(0.5)


def test_sums_are_float64() -> None:
    # In float32 a sum of 2^24 stops growing by 0.5.
    values = np.full(1 << 25, -0.5, dtype=np.float32)
    assert measures.logprob_sum(values) == -(1 << 24)


@pytest.mark.parametrize(
    "measure",
    [
        measures.nll,
        measures.token_perplexity,
        measures.bits_per_token,
        measures.word_perplexity,
        measures.byte_perplexity,
        measures.bits_per_byte,
    ],
)
def test_nothing_to_divide_by_is_an_error(measure: object) -> None:
    with pytest.raises(ScoreModeError, match="is 0: there is nothing to average over"):
        measure(-1.0, 0)  # type: ignore[operator]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.01])
def test_impossible_values_are_errors(value: float) -> None:
    with pytest.raises(ScoreModeError, match=r"logprobs\[1\] is .*1 of 3 values"):
        measures.check_logprobs(np.array([-1.0, value, -2.0], dtype=np.float32))


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.zeros(3, dtype=int)])
def test_other_arrays_are_errors(values: np.ndarray) -> None:
    with pytest.raises(ScoreModeError, match="one floating-point log-probability a token"):
        measures.check_logprobs(values)


def test_rounding_above_zero_passes() -> None:
    assert measures.logprob_sum(np.array([1e-6], dtype=np.float32)) == pytest.approx(1e-6)


def test_beyond_float64_is_infinite() -> None:
    assert measures.token_perplexity(-1000.0, 1) == math.inf


@given(
    st.lists(
        st.lists(st.text(st.sampled_from("ab \n\té\u2003漢😀"), max_size=6), max_size=5), max_size=5
    )
)
def test_text_counter_is_lm_evals_count(documents: list[list[str]]) -> None:
    counter = measures.TextCounter()
    for pieces in documents:
        counter.start_document()
        for piece in pieces:
            counter.feed(piece)
    whole = ["".join(pieces) for pieces in documents]
    assert counter.words == sum(len(re.split(r"\s+", text)) for text in whole)
    assert counter.bytes == sum(len(text.encode("utf-8")) for text in whole)
