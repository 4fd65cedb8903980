"""The three parts of a decision: the posterior of the answer, its forecast, and their difference.

Each has two forms: a method that takes a `Reasoner` and returns the result, and a generator
(`*_steps`) for drivers that decide many problems side by side.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates.source import CandidateSource, State
from vllm.score.eig.entropy import (
    ESTIMATORS,
    LENGTH_NORMALIZATIONS,
    entropy,
    gain_estimate,
    log_posterior,
)
from vllm.score.eig.meter import Meter
from vllm.score.eig.types import (
    BUDGET,
    COST,
    FAILURE,
    GAIN,
    TIME,
    AnswerPosterior,
    Decision,
    Forecast,
)
from vllm.score.eig.work import (
    Batch,
    Continuation,
    DeadlineExceeded,
    Reasoner,
    Sample,
    Score,
    Steps,
    drive,
    total,
)
from vllm.score.errors import ScoreModeError

logger = logging.getLogger("vllm_score.eig")


class AnswerPosteriorEstimator:
    """P_t over candidate answers, from exact log-probabilities.

    Args:
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

    def __init__(
        self,
        candidates: CandidateSource,
        tokenizer: object,
        *,
        beam_size: int = 8,
        answer_format: AnswerFormat | None = None,
        length_normalization: str = "none",
    ) -> None:
        if length_normalization not in LENGTH_NORMALIZATIONS:
            raise ScoreModeError(
                f"length_normalization is {length_normalization!r}; it must be one of "
                f"{', '.join(LENGTH_NORMALIZATIONS)}."
            )
        self.candidates, self.tokenizer, self.beam_size = candidates, tokenizer, beam_size
        self.answer_format = answer_format or AnswerFormat()
        self.length_normalization = length_normalization
        # The same candidates count before and after a step.
        self._encode = lru_cache(maxsize=4)(partial(self.answer_format.encode, tokenizer))

    def estimate(self, reasoner: Reasoner, state: State) -> AnswerPosterior:
        """Propose candidates at a state and return their posterior."""

        def steps() -> Steps[AnswerPosterior]:
            answers = yield from self.propose_steps(state)
            return (yield from self.posterior_steps(state, answers))

        return drive(steps(), reasoner)

    def propose_steps(self, state: State, deadline: float | None = None) -> Steps[list[str]]:
        """At most `beam_size` candidates."""
        return (
            yield from self.candidates.propose(
                state, self.beam_size, self.answer_format, self.tokenizer, deadline
            )
        )

    def posterior_steps(
        self, state: State, answers: Sequence[str], deadline: float | None = None
    ) -> Steps[AnswerPosterior]:
        """The posterior over the likeliest `beam_size` of the answers."""
        cue, targets = self._encode(tuple(answers))
        scores = yield Batch([Score([*state.token_ids, *cue], targets)], deadline)
        posterior = self._posterior(answers, targets, scores[0])
        if len(answers) <= self.beam_size:
            return posterior
        best = np.argsort(-posterior.log_posterior, kind="stable")[: self.beam_size]
        kept = sorted(best.tolist())
        return self._posterior(
            [answers[i] for i in kept], [targets[i] for i in kept], [scores[0][i] for i in kept]
        )

    def forecast_steps(
        self,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[str],
        deadline: float | None = None,
    ) -> Steps[list[AnswerPosterior]]:
        """The posteriors over all the answers after each context; equal contexts count once."""
        cue, targets = self._encode(tuple(answers))
        distinct = {tuple(context): i for i, context in reversed(list(enumerate(contexts)))}
        work = [Score([*context, *cue], targets) for context in distinct]
        results = dict(zip(distinct, (yield Batch(work, deadline)), strict=True))
        return [self._posterior(answers, targets, results[tuple(c)]) for c in contexts]

    def _posterior(
        self,
        answers: Sequence[str],
        targets: Sequence[Sequence[int]],
        scores: Sequence[np.ndarray],
    ) -> AnswerPosterior:
        logprobs = np.array([total(values) for values in scores])
        logs = log_posterior(logprobs, self._lengths(answers, targets))
        return AnswerPosterior(
            list(answers), logprobs, logs, float(entropy(logs)), float(np.exp(logprobs).sum())
        )

    def _lengths(
        self, answers: Sequence[str], targets: Sequence[Sequence[int]]
    ) -> np.ndarray | None:
        if self.length_normalization == "none":
            return None
        if self.length_normalization == "tokens":
            return np.array([len(target) for target in targets])
        end = self.answer_format.end or ""
        return np.array([len((answer + end).encode()) for answer in answers])


class MonteCarloForecaster:
    """E[H_{t+1}], from continuations that the model itself writes.

    Args:
        estimator: of the posteriors.
        mc_samples: K.
        sample_length: tokens of a continuation at most.
        temperature, top_p: the policy under which reasoning goes on.
        stop: texts that end the reasoning, as "</think>".
    """

    def __init__(
        self,
        estimator: AnswerPosteriorEstimator,
        *,
        mc_samples: int = 5,
        sample_length: int = 64,
        temperature: float = 1.0,
        top_p: float = 0.9,
        stop: Sequence[str] = (),
    ) -> None:
        self.estimator, self.mc_samples, self.sample_length = estimator, mc_samples, sample_length
        self.temperature, self.top_p, self.stop = temperature, top_p, tuple(stop)

    def sampling(self, context: Sequence[int], count: int, max_tokens: int | None = None) -> Sample:
        """Draws of the policy after a context."""
        length = self.sample_length if max_tokens is None else max_tokens
        return Sample(context, count, length, self.temperature, self.top_p, self.stop)

    def forecast(
        self, reasoner: Reasoner, state: State, answers: Sequence[str], bridge: Sequence[int] = ()
    ) -> Forecast:
        """Sample continuations of a state and return the posteriors after them."""

        def steps() -> Steps[Forecast]:
            drawn = yield from self.sample_steps(state, bridge)
            return (yield from self.score_steps(state, answers, drawn, bridge))

        return drive(steps(), reasoner)

    def sample_steps(
        self, state: State, bridge: Sequence[int] = (), deadline: float | None = None
    ) -> Steps[list[Continuation]]:
        """K continuations of the state and the tokens of a continuation prompt."""
        work = self.sampling([*state.token_ids, *bridge], self.mc_samples)
        (drawn,) = yield Batch([work], deadline)
        return [without_stop(c, self.stop, self.estimator.tokenizer) for c in drawn]

    def score_steps(
        self,
        state: State,
        answers: Sequence[str],
        drawn: Sequence[Continuation],
        bridge: Sequence[int] = (),
        deadline: float | None = None,
    ) -> Steps[Forecast]:
        """The posteriors after each continuation, all in one batch."""
        contexts = [[*state.token_ids, *bridge, *c.token_ids] for c in drawn]
        posteriors = yield from self.estimator.forecast_steps(contexts, answers, deadline)
        logs = np.stack([p.log_posterior for p in posteriors])
        return Forecast(list(drawn), logs, entropy(logs))


class ExpectedInformationGainCalculator:
    """EIG_t = H_t - E[H_{t+1}], and the rule: go on as long as it is above lambda.

    Args:
        forecaster: and with it the estimator.
        lambda_cost: in nats a step.
        estimator: of the gain, see `vllm.score.eig.entropy`.
        max_computation_time: seconds for a decision; None: no limit.

    Raises:
        ScoreModeError: an unknown estimator, or one that needs more forecasts.
    """

    def __init__(
        self,
        forecaster: MonteCarloForecaster,
        *,
        lambda_cost: float = 0.05,
        estimator: str = "entropy_difference",
        max_computation_time: float | None = 30.0,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ScoreModeError(
                f"estimator is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}."
            )
        if estimator == "mutual_information" and forecaster.mc_samples < 2:
            raise ScoreModeError("mc_samples is 1; the mutual information needs at least 2.")
        self.forecaster, self.lambda_cost = forecaster, lambda_cost
        self.estimator, self.max_computation_time = estimator, max_computation_time

    def decide(self, reasoner: Reasoner, state: State) -> Decision:
        """Whether one more step pays at a state."""
        return drive(self.decide_steps(state), reasoner)

    def decide_steps(
        self,
        state: State,
        known: Sequence[str] = (),
        bridge: Sequence[int] = (),
        final: bool = False,
    ) -> Steps[Decision]:
        """The decision; whatever fails, or takes too long, is a decision to stop.

        Args:
            known: candidates of the decision before; the likeliest of these and new ones count.
            bridge: tokens that would come before the next step.
            final: no step can follow: the posterior alone.
        """
        meter = Meter()
        deadline = _deadline(self.max_computation_time)

        def decision() -> Steps[Decision]:
            posterior = yield from _posterior_now(
                self.forecaster.estimator, state, known, meter, deadline
            )
            # No draws could find a difference above H_t.
            bounded = self.estimator == "entropy_difference"
            if final or (bounded and posterior.entropy <= self.lambda_cost):
                return Decision(False, BUDGET if final else COST, posterior)
            try:
                return (yield from self._weigh(posterior, state, bridge, meter, deadline))
            except Exception as error:
                return _failed(error, meter, posterior)

        return (yield from _guarded(decision(), meter))

    def _weigh(
        self,
        posterior: AnswerPosterior,
        state: State,
        bridge: Sequence[int],
        meter: Meter,
        deadline: float | None,
    ) -> Steps[Decision]:
        forecaster = self.forecaster
        with meter.component("sampling"):
            drawn = yield from meter.steps(forecaster.sample_steps(state, bridge, deadline))
        with meter.component("scoring"):
            forecast = yield from meter.steps(
                forecaster.score_steps(state, posterior.answers, drawn, bridge, deadline)
            )
        estimate = gain_estimate(posterior.entropy, forecast.log_posteriors, self.estimator)
        go_on = estimate.gain > self.lambda_cost
        return Decision(go_on, GAIN if go_on else COST, posterior, estimate, forecast)


def posterior_decision(
    estimator: AnswerPosteriorEstimator,
    state: State,
    known: Sequence[str],
    max_computation_time: float | None,
) -> Steps[Decision]:
    """A decision to stop that holds the posterior at a state; a failure is in it, never raised."""
    meter = Meter()

    def decision() -> Steps[Decision]:
        deadline = _deadline(max_computation_time)
        posterior = yield from _posterior_now(estimator, state, known, meter, deadline)
        return Decision(False, BUDGET, posterior)

    return (yield from _guarded(decision(), meter))


def _posterior_now(
    estimator: AnswerPosteriorEstimator,
    state: State,
    known: Sequence[str],
    meter: Meter,
    deadline: float | None,
) -> Steps[AnswerPosterior]:
    """Over new candidates and those known before."""
    with meter.component("candidates"):
        answers = yield from meter.steps(estimator.propose_steps(state, deadline))
    with meter.component("posterior"):
        answers = list(dict.fromkeys([*answers, *known]))
        return (yield from meter.steps(estimator.posterior_steps(state, answers, deadline)))


def _guarded(decision: Steps[Decision], meter: Meter) -> Steps[Decision]:
    """The decision with what it cost; to stop, if it fails."""
    try:
        made = yield from decision
    except Exception as error:
        made = _failed(error, meter, None)
    return replace(
        made,
        seconds=dict(meter.seconds),
        tokens_sampled=meter.tokens_sampled,
        tokens_scored=meter.tokens_scored,
    )


def _failed(error: Exception, meter: Meter, posterior: AnswerPosterior | None) -> Decision:
    reason = TIME if isinstance(error, DeadlineExceeded) else FAILURE
    logger.warning("Reasoning stops: %s failed (%s): %s", meter.current, reason, error)
    return Decision(False, reason, posterior, failure=(meter.current, str(error)))


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def without_stop(drawn: Continuation, stop: Sequence[str], tokenizer: object) -> Continuation:
    """The continuation without the text that ended it, and the tokens that hold it."""
    if not drawn.finished or not any(text in drawn.text for text in stop):
        return drawn
    ids = list(drawn.token_ids)
    text = drawn.text
    while ids and any(mark in text for mark in stop):
        ids.pop()
        text = tokenizer.decode(ids)  # type: ignore[attr-defined]
    return Continuation(ids, text, True)
