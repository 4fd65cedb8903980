"""What passes between a model, the rules that decide, and whoever reads what they did.

Code that decides is coroutines that await `reasoner.run(batch)`: batches of work for a `Reasoner`.
So it runs unchanged on an `LLM`, on an `AsyncLLM` beside thousands of other requests
(`vllm.score.eig.engines`), and on an exact sampler; and many of them, side by side, keep an engine
full. From the results come posteriors and forecasts, decisions that rest on them, and traces.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from vllm.score.errors import ScoreModeError, ScoreModeUnavailable
from vllm.v1.engine.exceptions import EngineDeadError

T = TypeVar("T")

MAX_TOP = 20


class DeadlineExceeded(ScoreModeError):
    """The work was not done in time; what was running is aborted."""


@dataclass(frozen=True)
class Sample:
    """Continuations of a context, drawn from the model; the result is a list of `Continuation`.

    Attributes:
        context: [n] token ids, n >= 1.
        count: number of independent draws.
        max_tokens: tokens of each at most.
        temperature, top_p: the policy; temperature 0 is greedy.
        stop: texts that end a continuation; they stay in its tokens and its text.
        ignore_eos: go on behind the end-of-sequence token.
    """

    context: Sequence[int]
    count: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Continuation:
    """One draw.

    Attributes:
        token_ids: [m] without the end-of-sequence token.
        text: of these tokens.
        finished: it ended by itself (end of sequence, or a stop text), not by `max_tokens`.
    """

    token_ids: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Score:
    """Log-probabilities of token sequences after a context.

    The result is a list with a float32 array [m_i], in nats, for each target: log p(target token
    | context, the target's tokens before it), under the model at temperature 1.

    Attributes:
        context: [n] token ids, n >= 1.
        targets: each [m_i] token ids, m_i >= 1.
    """

    context: Sequence[int]
    targets: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Next:
    """The most likely next tokens; the result is (int64 [top], float32 [top] in nats), best first.

    Attributes:
        context: [n] token ids, n >= 1.
        top: from 1 to 20.
    """

    context: Sequence[int]
    top: int


Work = Sample | Score | Next


@dataclass(frozen=True)
class Batch:
    """Work that can be done at once; the results are a list in this order.

    Attributes:
        work: independent pieces, at least one.
        deadline: on the clock of `time.monotonic`; None: whenever.
    """

    work: Sequence[Work]
    deadline: float | None = None


class Reasoner(Protocol):
    """A model that does batches of work, and its tokenizer."""

    tokenizer: Any

    async def run(self, batch: Batch) -> list[Any]:
        """The results of a batch. Where a piece fails, the rest is aborted.

        Raises:
            DeadlineExceeded: it was not done in time; what was running is aborted.
            ScoreModeError: the work is malformed, or it failed.
        """
        ...


# Something to find out about a model, e.g. the reasoning about one question.
Problem = Callable[[Reasoner], Coroutine[Any, Any, T]]


def ends_everything(error: BaseException) -> bool:
    """Whether an error is the engine's and no batch's: score mode is off there, or it is dead.

    Taken for a decision that failed, it would be said of every question of a run.
    """
    return isinstance(error, (ScoreModeUnavailable, EngineDeadError))


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
