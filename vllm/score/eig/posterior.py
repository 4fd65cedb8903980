"""The posterior of the answer, its entropy, and what one more step is expected to tell; in nats.

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
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
from scipy.special import entr

from vllm.score.checks import check_name
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates import CandidateSource, State
from vllm.score.eig.records import (
    AnswerPosterior,
    Batch,
    Continuation,
    Forecast,
    GainEstimate,
    Reasoner,
    Sample,
    Score,
)
from vllm.score.errors import ScoreModeError

LENGTH_NORMALIZATIONS = ("none", "tokens", "bytes")
ESTIMATORS = ("entropy_difference", "mutual_information")


@dataclass(eq=False)
class AnswerPosteriorEstimator:
    """P_t over candidate answers, from exact log-probabilities.

    Attributes:
        candidates: proposes answers at a state.
        tokenizer: the model's.
        beam_size: number of candidates at most.
        answer_format: what comes before and after an answer.
        length_normalization: "none": the model's own distribution over the candidates; "tokens",
            "bytes": each log-probability divided by that length of the answer and its end, as
            multiple-choice accuracies are often normalised.

    Raises:
        ScoreModeError: an unknown normalisation.
    """

    candidates: CandidateSource
    tokenizer: Any
    _: KW_ONLY
    beam_size: int = 8
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    length_normalization: str = "none"

    def __post_init__(self) -> None:
        check_name("length_normalization", self.length_normalization, LENGTH_NORMALIZATIONS)
        # The same candidates count before and after a step.
        self._encode = lru_cache(maxsize=4)(partial(self.answer_format.encode, self.tokenizer))

    async def estimate(self, reasoner: Reasoner, state: State) -> AnswerPosterior:
        """Propose candidates at a state and return their posterior."""
        return await self.posterior(reasoner, state, await self.propose(reasoner, state))

    async def propose(self, reasoner: Reasoner, state: State) -> list[str]:
        """At most `beam_size` candidates."""
        return await self.candidates.propose(reasoner, state, self.beam_size, self.answer_format)

    async def posterior(
        self, reasoner: Reasoner, state: State, answers: Sequence[str]
    ) -> AnswerPosterior:
        """The posterior over the likeliest `beam_size` of the answers."""
        (logprobs,) = await self._logprobs(reasoner, [state.token_ids], answers)
        found = self._normalised(answers, logprobs)
        if len(answers) <= self.beam_size:
            return found
        best = np.argsort(-found.log_posterior, kind="stable")[: self.beam_size]
        kept = sorted(best.tolist())
        return self._normalised([answers[i] for i in kept], logprobs[kept])

    async def after(
        self, reasoner: Reasoner, contexts: Sequence[Sequence[int]], answers: Sequence[str]
    ) -> list[AnswerPosterior]:
        """The posteriors over all the answers after each context; equal contexts count once."""
        distinct = list(dict.fromkeys(map(tuple, contexts)))
        logprobs = await self._logprobs(reasoner, distinct, answers)
        found = dict(zip(distinct, logprobs, strict=True))
        return [self._normalised(answers, found[tuple(context)]) for context in contexts]

    async def _logprobs(
        self, reasoner: Reasoner, contexts: Sequence[Sequence[int]], answers: Sequence[str]
    ) -> list[np.ndarray]:
        """Log p(answer and its end | context, cue) after each context, float64 [A]."""
        cue, targets = self._encode(tuple(answers))
        results = await reasoner.run(Batch([Score([*c, *cue], targets) for c in contexts]))
        return [np.array([np.sum(v, dtype=np.float64) for v in scores]) for scores in results]

    def _normalised(self, answers: Sequence[str], logprobs: np.ndarray) -> AnswerPosterior:
        lengths: Any = None
        if self.length_normalization == "tokens":
            lengths = [len(target) for target in self._encode(tuple(answers))[1]]
        elif self.length_normalization == "bytes":
            lengths = [len((each + (self.answer_format.end or "")).encode()) for each in answers]
        logs = log_posterior(logprobs, lengths)
        coverage = float(np.exp(logprobs).sum())
        return AnswerPosterior(list(answers), logprobs, logs, float(entropy(logs)), coverage)


@dataclass(eq=False)
class MonteCarloForecaster:
    """E[H_{t+1}], from continuations that the model itself writes.

    Attributes:
        estimator: of the posteriors.
        mc_samples: K.
        sample_length: tokens of a continuation at most.
        temperature, top_p: the policy under which reasoning goes on.
        stop: texts that end the reasoning, e.g. "</think>".
    """

    estimator: AnswerPosteriorEstimator
    _: KW_ONLY
    mc_samples: int = 5
    sample_length: int = 64
    temperature: float = 1.0
    top_p: float = 0.9
    stop: tuple[str, ...] = ()

    async def draw(
        self, reasoner: Reasoner, context: Sequence[int], count: int, max_tokens: int | None = None
    ) -> list[Continuation]:
        """`count` continuations of a context, without the text that ended them."""
        length = self.sample_length if max_tokens is None else max_tokens
        work = Sample(context, count, length, self.temperature, self.top_p, self.stop)
        (drawn,) = await reasoner.run(Batch([work]))
        return [without_stop(each, self.stop, self.estimator.tokenizer) for each in drawn]

    async def score(
        self,
        reasoner: Reasoner,
        context: Sequence[int],
        answers: Sequence[str],
        drawn: Sequence[Continuation],
    ) -> Forecast:
        """The posteriors after each continuation of a context, all in one batch."""
        contexts = [[*context, *each.token_ids] for each in drawn]
        posteriors = await self.estimator.after(reasoner, contexts, answers)
        logs = np.stack([posterior.log_posterior for posterior in posteriors])
        return Forecast(list(drawn), logs, entropy(logs))


def without_stop(drawn: Continuation, stop: Sequence[str], tokenizer: Any) -> Continuation:
    """The continuation without the text that ended it, and the tokens that hold it."""
    if not drawn.finished or not any(text in drawn.text for text in stop):
        return drawn
    ids, text = list(drawn.token_ids), drawn.text
    while ids and any(mark in text for mark in stop):
        ids.pop()
        text = tokenizer.decode(ids)
    return Continuation(ids, text, True)


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
    return _entropy_of(np.exp(np.asarray(log_probabilities, dtype=np.float64)))


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
    logs = np.asarray(log_posteriors, dtype=np.float64)
    draws = len(logs)
    check_draws(estimator, draws)
    entropies = entropy(logs)
    expected = float(entropies.mean())
    difference = current - expected
    information, information_error = _mutual_information(logs, entropies)
    gain, error = information, information_error
    if estimator == "entropy_difference":
        gain = difference
        error = float(entropies.std(ddof=1)) / math.sqrt(draws) if draws > 1 else math.nan
    return GainEstimate(current, expected, gain, error, difference, information)


def check_draws(estimator: str, mc_samples: int) -> None:
    """Raise ScoreModeError for an unknown estimator, or too few forecasts for it."""
    check_name("estimator", estimator, ESTIMATORS)
    least = 2 if estimator == "mutual_information" else 1
    if mc_samples < least:
        raise ScoreModeError(
            f"mc_samples is {mc_samples}; estimator={estimator!r} needs at least {least}."
        )


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
    # Differences and sums of rounded numbers may fall below 0 by the last bit.
    return np.asarray(np.maximum(entr(np.maximum(probabilities, 0.0)).sum(-1), 0.0))
