"""The arithmetic, against definitions written down again and against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from tests.eig.markov import random_reasoner
from vllm.score.eig.posterior import entropy, gain_estimate, log_posterior
from vllm.score.errors import ScoreModeError

logprobs = arrays(np.float64, st.integers(1, 12), elements=st.floats(-60, 0))


@given(logprobs)
def test_posterior_is_a_distribution_in_the_same_proportions(values):
    logs = log_posterior(values)
    assert np.exp(logs).sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(logs - logs[0], values - values[0], atol=1e-10)


def test_posterior_by_hand():
    logs = log_posterior(np.log([0.3, 0.1]))
    np.testing.assert_allclose(np.exp(logs), [0.75, 0.25])
    by_length = log_posterior(np.log([0.25, 0.0625]), np.array([1, 2]))
    np.testing.assert_allclose(np.exp(by_length), [0.5, 0.5])


def test_an_impossible_candidate_has_no_share():
    logs = log_posterior(np.array([-3.0, -np.inf]))
    np.testing.assert_array_equal(np.exp(logs), [1.0, 0.0])
    assert entropy(logs) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no candidates"),
        ([-1.0, math.nan], "not a number"),
        ([math.inf], "not a number"),
        ([-math.inf, -math.inf], "every candidate has probability 0"),
    ],
)
def test_no_posterior(values, message):
    with pytest.raises(ScoreModeError, match=message):
        log_posterior(np.array(values))


@given(logprobs)
def test_entropy_is_that_of_scipy_and_within_its_bounds(values):
    logs = log_posterior(values)
    assert entropy(logs) == pytest.approx(stats.entropy(np.exp(logs)), abs=1e-9)
    assert 0.0 <= entropy(logs) <= math.log(len(values)) + 1e-12


def test_entropy_by_hand():
    uniform = np.log(np.full((2, 4), 0.25))
    np.testing.assert_allclose(entropy(uniform), [math.log(4)] * 2)


def test_gain_by_hand():
    """H of (1/2, 1/2) is ln 2; one forecast leaves it, the other knows the answer."""
    with np.errstate(divide="ignore"):
        after = np.log([[0.5, 0.5], [1.0, 0.0]])
    found = gain_estimate(math.log(2), after)
    assert found.expected_entropy == pytest.approx(math.log(2) / 2)
    assert found.gain == found.entropy_difference == pytest.approx(math.log(2) / 2)
    # Two values, 0 and ln 2: s = ln 2 / sqrt(2), divided by sqrt(2).
    assert found.standard_error == pytest.approx(math.log(2) / 2)


def test_mutual_information_is_the_mean_divergence_from_the_mean_jackknifed():
    random = np.random.default_rng(0)
    after = random.dirichlet(np.ones(5), size=7)

    def plain(rows):
        mean = rows.mean(0)
        return np.mean([stats.entropy(row, mean) for row in rows])

    left_out = np.array([plain(np.delete(after, k, 0)) for k in range(7)])
    found = gain_estimate(1.0, np.log(after), "mutual_information")
    assert found.gain == found.mutual_information
    assert found.gain == pytest.approx(7 * plain(after) - 6 * left_out.mean(), abs=1e-12)
    error = math.sqrt(6 / 7 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(error, abs=1e-12)


@settings(max_examples=50)
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 1000))
def test_mutual_information_of_equal_forecasts_is_nothing(answers, draws, seed):
    row = np.random.default_rng(seed).dirichlet(np.ones(answers))
    found = gain_estimate(0.3, np.log(np.tile(row, (draws, 1))), "mutual_information")
    assert found.gain == pytest.approx(0.0, abs=1e-9)
    assert found.standard_error == pytest.approx(0.0, abs=1e-7)


def test_one_forecast_has_no_error():
    found = gain_estimate(1.0, np.log([[0.5, 0.5]]))
    assert found.gain == pytest.approx(1.0 - math.log(2))
    assert math.isnan(found.standard_error) and math.isnan(found.mutual_information)
    with pytest.raises(ScoreModeError, match=r"mc_samples is 1; .*needs at least 2"):
        gain_estimate(1.0, np.log([[0.5, 0.5]]), "mutual_information")


def test_unknown_estimators_and_no_draws():
    with pytest.raises(ScoreModeError, match="'median' is unknown; there are entropy_difference"):
        gain_estimate(1.0, np.zeros((2, 1)), "median")
    with pytest.raises(ScoreModeError, match=r"mc_samples is 0; .*needs at least 1"):
        gain_estimate(1.0, np.zeros((0, 3)))


@pytest.mark.parametrize("seed", range(5))
def test_both_estimators_agree_on_a_coherent_reasoner(seed):
    """With every continuation as often as it is likely, both are the mutual information."""
    reasoner = random_reasoner(answers=4, states=3, seed=seed, sharpness=2.0)
    chain = [0, 1]
    exact, _ = reasoner.gain(chain, 2)
    paths = list(itertools.product(range(3), repeat=2))
    after = np.array([reasoner.posterior([*chain, *path]) for path in paths])
    weights = np.array(
        [
            reasoner.next_probabilities(chain)[path[0]]
            * reasoner.next_probabilities([*chain, path[0]])[path[1]]
            for path in paths
        ]
    )
    np.testing.assert_allclose(weights @ after, reasoner.posterior(chain), atol=1e-12)
    mutual = sum(
        w * stats.entropy(row, weights @ after) for w, row in zip(weights, after, strict=True)
    )
    assert exact == pytest.approx(mutual, abs=1e-12)
    assert exact > 0
