"""Block bootstrap on series whose long-run variance is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.bootstrap import (
    MINIMUM_TERMS,
    BlockBootstrap,
    MeanEstimate,
    optimal_block_length,
)


def autoregression(rho: float, terms: int, seed: int) -> np.ndarray:
    """x[t] = rho x[t-1] + e[t], e standard normal; n var(mean) tends to 1 / (1 - rho)^2."""
    noise = np.random.default_rng(seed).normal(size=terms + 1000)
    return lfilter([1.0], [1.0, -rho], noise)[1000:]


def estimate(values: np.ndarray, **options: int) -> MeanEstimate:
    bootstrap = BlockBootstrap(**options)
    bootstrap.add(values)
    return bootstrap.estimate(resamples=200)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 0.9])
def test_standard_error_of_an_autoregression(rho: float) -> None:
    terms = 20_000
    true = 1 / (1 - rho) / math.sqrt(terms)
    found = [estimate(autoregression(rho, terms, seed)).standard_error for seed in range(20)]
    assert np.mean(found) == pytest.approx(true, rel=0.06)
    # What ignoring the correlation would give is far off.
    if rho == 0.9:
        naive = 1 / math.sqrt(1 - rho**2) / math.sqrt(terms)
        assert np.mean(found) > 3 * naive


def test_interval_covers_as_often_as_it_says() -> None:
    # Mean of 200 series; 95 % of the intervals hold it, give or take 3 standard deviations.
    hits = 0
    for seed in range(200):
        low, high = estimate(autoregression(0.5, 4000, seed)).interval or (0, 0)
        hits += low <= 0 <= high
    assert 0.95 - 3 * math.sqrt(0.05 * 0.95 / 200) - 0.01 <= hits / 200 <= 1


def test_closed_form_is_the_limit_of_resampling() -> None:
    values = autoregression(0.6, 3000, 1)
    found = estimate(values)
    length = found.block_length
    assert length is not None and length > 1
    random = np.random.default_rng(5)
    circle = np.concatenate([values, values])
    blocks = values.size / length
    starts = random.integers(0, values.size, (4000, round(blocks)))
    means = np.array([[circle[s : s + length].mean() for s in row] for row in starts[:, :4]])
    # The variance of one block mean over k is the variance of the mean of k.
    drawn = math.sqrt(means.var() / blocks)
    assert found.standard_error == pytest.approx(drawn, rel=0.05)


@pytest.mark.parametrize("rho", [0.3, 0.7, 0.9])
def test_block_length_follows_politis_and_white(rho: float) -> None:
    terms = 50_000
    # For this process G / g(0) = 2 rho / (1 - rho^2).
    true = (1.5 * (2 * rho / (1 - rho**2)) ** 2 * terms) ** (1 / 3)
    found = [optimal_block_length(autoregression(rho, terms, seed)) for seed in range(10)]
    assert np.mean(found) == pytest.approx(true, rel=0.2)


def test_block_length_from_the_cited_formula() -> None:
    """The same rule, written as sums over lags."""
    values = autoregression(0.5, 700, 3)
    n = values.size
    centred = values - values.mean()
    r = np.array([np.dot(centred[: n - k], centred[k:]) / n for k in range(n)])
    k_n = max(5, math.ceil(math.log10(n)))
    bound = 2 * math.sqrt(math.log10(n) / n)
    m = next(m for m in range(n) if all(abs(r[m + j] / r[0]) < bound for j in range(1, k_n + 1)))
    window = 2 * max(m, 1)

    def weight(x: float) -> float:
        return 1.0 if abs(x) <= 0.5 else 2 * (1 - abs(x))

    lags = range(-window, window + 1)
    g = sum(weight(k / window) * abs(k) * r[abs(k)] for k in lags)
    g0 = sum(weight(k / window) * r[abs(k)] for k in lags)
    expected = (2 * g**2 / (4 / 3 * g0**2) * n) ** (1 / 3)
    assert optimal_block_length(values) == pytest.approx(expected)


def test_pieces_give_what_the_whole_gives() -> None:
    values = autoregression(0.4, 10_001, 2)
    whole = estimate(values)
    bootstrap = BlockBootstrap()
    for start in range(0, values.size, 137):
        bootstrap.add(values[start : start + 137])
    assert bootstrap.estimate(resamples=200) == whole


def test_little_memory_gives_nearly_the_same() -> None:
    values = autoregression(0.8, 30_000, 4)
    full, small = estimate(values), estimate(values, max_cells=3000)
    assert small.mean == pytest.approx(full.mean, abs=1e-12)
    assert small.standard_error == pytest.approx(full.standard_error, rel=0.1)
    assert small.block_length is not None and small.block_length % 16 == 0


def test_equal_terms_have_no_error() -> None:
    found = estimate(np.full(100, 2.5))
    assert (found.mean, found.standard_error, found.interval) == (2.5, 0.0, (2.5, 2.5))


def test_few_terms_have_a_mean_only() -> None:
    found = estimate(np.arange(MINIMUM_TERMS - 1.0))
    assert (found.mean, found.standard_error, found.interval) == (14.0, None, None)


def test_no_terms_have_no_mean() -> None:
    with pytest.raises(ScoreModeError, match="no terms"):
        BlockBootstrap().estimate()


def test_the_seed_fixes_the_interval() -> None:
    values = autoregression(0.2, 500, 0)
    bootstrap = BlockBootstrap()
    bootstrap.add(values)
    assert bootstrap.estimate(seed=1) == bootstrap.estimate(seed=1)
    assert bootstrap.estimate(seed=1).interval != bootstrap.estimate(seed=2).interval
