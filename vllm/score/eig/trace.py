"""What a decision rests on, and what came of a run of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm.score.eig.entropy import GainEstimate
from vllm.score.eig.reasoner import Continuation


@dataclass(frozen=True)
class AnswerPosterior:
    """Distribution over candidate answers at one state of the reasoning.

    Attributes:
        answers: [A] texts, distinct.
        logprobs: float64 [A], log p(answer and its end | context, cue) in nats, not normalised.
        log_posterior: float64 [A], normalised over the candidates, after length normalisation.
        entropy: of the posterior, in nats, from 0 to ln A.
        coverage: sum of exp(logprobs): the probability that the answer is one of the candidates
            (where each candidate is scored to its end, so that none begins another).
    """

    answers: list[str]
    logprobs: np.ndarray
    log_posterior: np.ndarray
    entropy: float
    coverage: float

    @property
    def best(self) -> str:
        """The likeliest answer; the first of equals."""
        return self.answers[int(np.argmax(self.log_posterior))]


@dataclass(frozen=True)
class Forecast:
    """Posteriors after K sampled continuations.

    Attributes:
        continuations: [K].
        log_posteriors: float64 [K, A].
        entropies: float64 [K], in nats.
    """

    continuations: list[Continuation]
    log_posteriors: np.ndarray
    entropies: np.ndarray


# Why reasoning went on or stopped.
GAIN, COST, BUDGET, TIME, FAILURE, ENDED = "gain", "cost", "budget", "time", "failure", "ended"


@dataclass(frozen=True)
class Decision:
    """Whether to take one more step.

    Attributes:
        go_on: the verdict.
        reason: GAIN (it pays), COST (it does not), BUDGET (no tokens left), TIME (the time limit),
            FAILURE, or ENDED (the model ended its reasoning, as often as it may be overruled).
        posterior: at this state; None where it could not be had.
        estimate, forecast: None for rules that make none, where they could not be had, and where
            H_t is no more than the cost: a gain above it is then impossible.
        failure: component and message, after a failure or the time limit.
        seconds: wall time by component ("candidates", "posterior", "sampling", "scoring").
        tokens_sampled: tokens drawn for the decision (candidates and forecasts).
        tokens_scored: answer tokens scored for it.
    """

    go_on: bool
    reason: str
    posterior: AnswerPosterior | None = None
    estimate: GainEstimate | None = None
    forecast: Forecast | None = None
    failure: tuple[str, str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_sampled: int = 0
    tokens_scored: int = 0


@dataclass(frozen=True)
class Step:
    """One decision and what followed it.

    Attributes:
        position: tokens of reasoning before the decision.
        decision: whether to go on.
        prompt: the text inserted, where the model had ended its reasoning by itself; else "".
        text: the reasoning that followed; "" after a stop.
        tokens: number of tokens of prompt and text.
    """

    position: int
    decision: Decision
    prompt: str = ""
    text: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Trace:
    """The reasoning about one question.

    Attributes:
        prompt_token_ids: the question.
        reasoning_token_ids: what the model (and continuation prompts) added.
        reasoning: its text.
        ended: the model ended its reasoning by itself.
        steps: in order; the last one stopped.
        answer: the likeliest candidate when reasoning stopped; None where no posterior was had.
        tokens_sampled: all tokens drawn, for decisions and as reasoning, once where both.
    """

    prompt_token_ids: list[int]
    reasoning_token_ids: list[int]
    reasoning: str
    ended: bool
    steps: list[Step]
    answer: str | None
    tokens_sampled: int = 0

    @property
    def entropies(self) -> np.ndarray:
        """H_t at each decision, float64 [n]; NaN where there is none."""
        found = [s.decision.posterior for s in self.steps]
        return np.array([np.nan if p is None else p.entropy for p in found])

    @property
    def gains(self) -> np.ndarray:
        """EIG_t at each decision, float64 [n]; NaN where there is none."""
        found = [s.decision.estimate for s in self.steps]
        return np.array([np.nan if e is None else e.gain for e in found])
