"""The baselines against straightforward code in float64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.baselines import count_tokens, uniform_perplexity, unigram_perplexity

V = 7
ids_of = st.lists(st.integers(0, V - 1), min_size=1, max_size=40)


@given(train=st.lists(st.integers(0, V - 1), max_size=60), held_out=ids_of)
def test_unigram_perplexity_is_the_textbook_one(train: list[int], held_out: list[int]) -> None:
    seen = Counter(train)
    product = 1.0
    for token in held_out:
        product *= ((seen[token] + 1) / (len(train) + V)) ** (1 / len(held_out))
    assert unigram_perplexity(held_out, count_tokens(train, V)) == pytest.approx(
        1 / product, rel=1e-12
    )


def test_without_training_text_unigram_is_uniform() -> None:
    assert unigram_perplexity([0, 3, 3], np.zeros(V, dtype=np.int64)) == pytest.approx(V)
    assert uniform_perplexity(V) == 7.0


def test_on_its_own_training_text_it_tends_to_the_entropy() -> None:
    # p = 1/2, 1/4, 1/4: entropy 1.5 bits; with many tokens the smoothing no longer shows.
    tokens = [0, 0, 1, 2] * 100_000
    result = unigram_perplexity(tokens, count_tokens(tokens, 3))
    assert result == pytest.approx(2**1.5, rel=1e-5)


def test_counts() -> None:
    counts = count_tokens([1, 1, 4], V)
    assert counts.dtype == np.int64
    assert counts.tolist() == [0, 2, 0, 0, 1, 0, 0]
    assert count_tokens([], V).tolist() == [0] * V


def test_large_counts_do_not_overflow() -> None:
    counts = np.full(2, 2**62 - 1, dtype=np.int64)
    counts[1] //= 2
    assert unigram_perplexity([0], counts) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "token_ids is empty"),
        ([0, 7], "token_ids holds 7, outside the vocabulary of 7"),
        ([-1], "token_ids holds -1, outside"),
        ([0.5], "must be a vector of integers"),
        ([[1, 2]], "must be a vector of integers"),
        ([True], "must be a vector of integers"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(token_ids: list, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        unigram_perplexity(token_ids, np.ones(V, dtype=np.int64))


@pytest.mark.parametrize(
    "counts", [np.ones((2, 2), dtype=int), np.ones(3), np.array([1, -1]), np.array([], dtype=int)]
)
def test_counts_that_are_none_are_refused(counts: np.ndarray) -> None:
    with pytest.raises(ScoreModeError, match="counts has shape"):
        unigram_perplexity([0], counts)


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ScoreModeError, match="vocab_size is 0"):
        uniform_perplexity(0)
    assert math.isclose(uniform_perplexity(1), 1.0)
