"""The arithmetic of expected information gain; no model, NumPy alone, all in nats.

Let A be the answer to a question, h_t the question and the reasoning so far, and Y the next piece
of reasoning. The posterior of the answer is P_t(a) = p(A = a | h_t) and its Shannon entropy
H_t = -sum_a P_t(a) ln P_t(a). One more piece is expected to leave H_{t+1} = H(p(A | h_t, Y)), so

    EIG_t = H_t - E[H_{t+1} | h_t],    Y ~ p(. | h_t).

This is the expected information of an experiment whose outcome is Y (Lindley 1956, "On a measure
of the information provided by an experiment"). For a coherent reasoner, whose posteriors average
to the one it has now (E[P_{t+1}] = P_t), it is the mutual information I(A; Y | h_t) (Cover &
Thomas, "Elements of Information Theory", 2.4), hence never negative. A language model need not
be coherent: reasoning may leave it less sure than before, and EIG_t may be below 0.

Two estimators, from posteriors P^1..P^K after K independent draws of Y:

``entropy_difference``  H_t - mean_k H(P^k): unbiased for EIG_t, with standard error s / sqrt(K),
    s the standard deviation of the H(P^k) (H_t is computed, not estimated).
``mutual_information``  H(mean_k P^k) - mean_k H(P^k) = mean_k KL(P^k || mean P): what the draws
    disagree about, whatever the model says now (as Houlsby et al. 2011, "Bayesian active learning
    for classification", score questions). The mean of K draws has less entropy than the true
    mean, a bias of order 1/K; it is removed to that order by the jackknife (Efron 1982, "The
    jackknife, the bootstrap and other resampling plans"), which also gives the standard error.

Where the draws do not follow p(. | h_t) but a policy (a temperature, top-p), the expectation is
over that policy: what will be written if reasoning goes on under it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from vllm.score.checks import check_name
from vllm.score.errors import ScoreModeError

LENGTH_NORMALIZATIONS = ("none", "tokens", "bytes")
ESTIMATORS = ("entropy_difference", "mutual_information")


@dataclass(frozen=True)
class GainEstimate:
    """Expected information gain of one more step, in nats.

    Attributes:
        entropy: H_t.
        expected_entropy: the mean of H_{t+1} over the forecasts.
        gain: the estimate that is compared with the cost.
        standard_error: of the gain; NaN for one forecast.
        entropy_difference, mutual_information: both estimators; the gain is one of them.
    """

    entropy: float
    expected_entropy: float
    gain: float
    standard_error: float
    entropy_difference: float
    mutual_information: float


def log_posterior(logprobs: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """Normalise the log-probabilities of candidates into a distribution over them.

    Args:
        logprobs: float64 [..., A], log p(a | context).
        lengths: [A], what each is divided by; None: nothing, the exact conditional distribution
            given that the answer is among the candidates.

    Returns:
        float64 [..., A].

    Raises:
        ScoreModeError: there is no candidate, a NaN, or no candidate is possible.
    """
    scores = np.asarray(logprobs, dtype=np.float64)
    if scores.shape[-1] == 0:
        raise ScoreModeError("there are no candidates; a posterior needs at least one.")
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise ScoreModeError("the log-probability of a candidate is not a number.")
    if lengths is not None:
        scores = scores / np.asarray(lengths, dtype=np.float64)
    normaliser = np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    if np.isneginf(normaliser).any():
        raise ScoreModeError("every candidate has probability 0; give candidates that can be.")
    return scores - normaliser


def entropy(log_probabilities: np.ndarray) -> np.ndarray:
    """Shannon entropy of distributions [..., A], given as logs, in nats; 0 ln 0 = 0."""
    logs = np.asarray(log_probabilities, dtype=np.float64)
    finite = np.where(np.isneginf(logs), 0.0, logs)
    # A sum of rounded terms may fall below 0 by the last bit.
    return np.maximum(-(np.exp(logs) * finite).sum(-1), 0.0)


def gain_estimate(
    current: float, log_posteriors: np.ndarray, estimator: str = "entropy_difference"
) -> GainEstimate:
    """Expected information gain from posteriors after sampled continuations.

    Args:
        current: H_t.
        log_posteriors: float64 [K, A], over the candidates whose entropy is H_t.
        estimator: one of `ESTIMATORS`.

    Returns:
        With K = 1 the standard error is NaN, and so is the mutual information.

    Raises:
        ScoreModeError: an unknown estimator, no draws, or one draw for the mutual information.
    """
    check_name("estimator", estimator, ESTIMATORS)
    logs = np.asarray(log_posteriors, dtype=np.float64)
    draws = len(logs)
    if draws == 0 or (draws == 1 and estimator == "mutual_information"):
        raise ScoreModeError(
            f"{estimator} from {draws} forecasts; raise mc_samples to at least {1 + draws}."
        )
    entropies = entropy(logs)
    expected = float(entropies.mean())
    difference = current - expected
    information, information_error = _mutual_information(logs, entropies)
    if estimator == "entropy_difference":
        error = float(entropies.std(ddof=1)) / math.sqrt(draws) if draws > 1 else math.nan
        gain = difference
    else:
        gain, error = information, information_error
    return GainEstimate(current, expected, gain, error, difference, information)


def _mutual_information(logs: np.ndarray, entropies: np.ndarray) -> tuple[float, float]:
    """Jackknifed estimate and its standard error; NaN for one draw."""
    draws = len(logs)
    if draws == 1:
        return math.nan, math.nan
    probabilities = np.exp(logs)
    total = probabilities.sum(0)
    plain = _entropy_of(total / draws) - entropies.mean()
    without = (total - probabilities) / (draws - 1)
    left_out = _entropy_of(without) - (entropies.sum() - entropies) / (draws - 1)
    value = draws * plain - (draws - 1) * left_out.mean()
    variance = (draws - 1) / draws * np.square(left_out - left_out.mean()).sum()
    return float(value), math.sqrt(float(variance))


def _entropy_of(probabilities: np.ndarray) -> np.ndarray:
    # What is left when a draw is taken from the sum may be below 0 by the last bit.
    return np.asarray(entr(np.maximum(probabilities, 0.0)).sum(-1))
