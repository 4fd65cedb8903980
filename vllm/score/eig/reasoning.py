"""Reasoning about one question, a step at a time, until a rule stops it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vllm.score.eig.candidates.source import State
from vllm.score.eig.core import MonteCarloForecaster, without_stop
from vllm.score.eig.metrics import METRICS, EIGMetrics
from vllm.score.eig.prompts import ContinuationPrompts
from vllm.score.eig.rules import StoppingRule
from vllm.score.eig.types import (
    BUDGET,
    ENDED,
    FAILURE,
    TIME,
    AnswerPosterior,
    Decision,
    Step,
    Trace,
)
from vllm.score.eig.work import Batch, Continuation, DeadlineExceeded, Steps
from vllm.score.errors import ScoreModeError

logger = logging.getLogger("vllm_score.eig")

DECIDE_AT = ("step", "end")


@dataclass(frozen=True)
class ReasoningOptions:
    """What bounds the reasoning, besides the rule.

    Attributes:
        max_tokens_thinking: tokens of reasoning, continuation prompts included.
        decide_at: "step": before every `sample_length` tokens; "end": only where the model ends
            its reasoning by itself (budget forcing).
        thinking_n_ignore: how often the model is overruled at most when it ends its reasoning.
        prompts: what is inserted then.
        lambda_cost: the scale by which a prompt is chosen.

    Raises:
        ScoreModeError: a number below 0, an unknown `decide_at`.
    """

    max_tokens_thinking: int = 1024
    decide_at: str = "step"
    thinking_n_ignore: int = 4
    prompts: ContinuationPrompts = field(default_factory=ContinuationPrompts)
    lambda_cost: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, ContinuationPrompts):
            raise ScoreModeError(f"prompts is {self.prompts!r}; give ContinuationPrompts.")
        if self.decide_at not in DECIDE_AT:
            raise ScoreModeError(
                f"decide_at is {self.decide_at!r}; it must be one of {', '.join(DECIDE_AT)}."
            )
        for name in ("max_tokens_thinking", "thinking_n_ignore"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ScoreModeError(f"{name} must be a whole number from 0 on, got {value!r}.")


def reason(
    prompt_token_ids: Sequence[int],
    rule: StoppingRule,
    forecaster: MonteCarloForecaster,
    options: ReasoningOptions,
    *,
    seed: Sequence[int] = (0,),
    metrics: EIGMetrics = METRICS,
) -> Steps[Trace]:
    """Reason about a question; ends after `max_tokens_thinking` at the latest.

    A step that a decision has forecast is one of the forecasts, drawn uniformly: they are draws
    of what would be written next, and computed already.

    Args:
        prompt_token_ids: [n] the question, n >= 1.
        rule: when to stop.
        forecaster: the policy under which reasoning goes on, and its tokenizer.
        options: bounds.
        seed: of the choice among forecasts.
        metrics: count the decisions.

    Returns:
        The trace; a failure is its last step, never an exception.
    """
    run = _Run(list(prompt_token_ids), forecaster, options, np.random.default_rng(list(seed)))
    while True:
        if options.decide_at == "end" and not run.ended and run.left > 0:
            failure = yield from run.write_to_the_end()
            if failure is not None:
                metrics.record(failure)
                return run.stop(failure)
        overruled = run.ended and run.prompts >= options.thinking_n_ignore
        final = run.left <= 0 or overruled
        decision = yield from rule.decide_steps(run.state(), run.known(), run.bridge(), final)
        # Whatever the rule says: it failed, there is no room, or the model was overruled enough.
        if decision.failure is not None:
            decision = replace(decision, go_on=False)
        elif final:
            decision = replace(decision, go_on=False, reason=ENDED if overruled else BUDGET)
        metrics.record(decision)
        logger.debug("At %d tokens of reasoning: %s", len(run.reasoning), describe(decision))
        if not decision.go_on:
            return run.stop(decision)
        failure = yield from run.step(decision)
        if failure is not None:
            metrics.record(failure)
            return run.stop(failure)


def describe(decision: Decision) -> str:
    """A decision in a line."""
    posterior, estimate = decision.posterior, decision.estimate
    parts = ["go on" if decision.go_on else "stop", f"({decision.reason})"]
    if posterior is not None:
        parts.append(f"H = {posterior.entropy:.4f} nats, likeliest {posterior.best!r}")
    if estimate is not None:
        parts.append(f"EIG = {estimate.gain:.4f} ± {estimate.standard_error:.4f} nats")
    if decision.failure is not None:
        parts.append(": ".join(decision.failure))
    return " ".join(parts)


class _Run:
    """The reasoning so far."""

    def __init__(
        self,
        prompt: list[int],
        forecaster: MonteCarloForecaster,
        options: ReasoningOptions,
        random: np.random.Generator,
    ) -> None:
        self.prompt, self.forecaster, self.options = prompt, forecaster, options
        self.random = random
        self.tokenizer: Any = forecaster.estimator.tokenizer
        self.reasoning: list[int] = []
        self.steps: list[Step] = []
        self.ended = False
        self.prompts = self.tokens_sampled = 0

    @property
    def left(self) -> int:
        return self.options.max_tokens_thinking - len(self.reasoning)

    def state(self) -> State:
        return State([*self.prompt, *self.reasoning], self.tokenizer.decode(self.reasoning))

    def known(self) -> list[str]:
        """The candidates of the last decision."""
        posterior = self._last_posterior()
        return [] if posterior is None else posterior.answers

    def bridge(self) -> list[int]:
        """What would come before the next step: its gain, which chooses it, is not known yet."""
        return self._encode(self.options.prompts.neutral) if self.ended else []

    def write_to_the_end(self) -> Steps[Decision | None]:
        """Go on without decisions until the model ends its reasoning; return a failure."""
        drawn, failure = yield from self._draw([], self.left)
        if drawn is not None:
            self._add([], drawn)
        return failure

    def step(self, decision: Decision) -> Steps[Decision | None]:
        """Take a step that was decided; return a failure."""
        position = len(self.reasoning)
        text = ""
        if self.ended:
            prompts, estimate = self.options.prompts, decision.estimate
            text = prompts.neutral
            if estimate is not None:
                text = prompts.choose(estimate.gain, self.options.lambda_cost)
            self.prompts += 1
        inserted = self._encode(text)[: self.left]
        forecast = decision.forecast
        # A forecast is a draw of the next step only behind the same tokens.
        if forecast is not None and inserted == self.bridge()[: self.left]:
            drawn = forecast.continuations[self.random.integers(len(forecast.continuations))]
        else:
            forecast = None
            found, failure = yield from self._draw(inserted, self.forecaster.sample_length)
            if found is None:
                return failure
            drawn = found
        added = self._add(inserted, drawn)
        self.steps.append(
            Step(position, decision, text, self.tokenizer.decode(added), len(inserted + added))
        )
        return None

    def stop(self, decision: Decision) -> Trace:
        """The trace, with the decision that ended it."""
        self.steps.append(Step(len(self.reasoning), decision))
        posterior = self._last_posterior()
        return Trace(
            prompt_token_ids=self.prompt,
            reasoning_token_ids=self.reasoning,
            reasoning=self.tokenizer.decode(self.reasoning),
            ended=self.ended,
            steps=self.steps,
            answer=None if posterior is None else posterior.best,
            tokens_sampled=self.tokens_sampled
            + sum(step.decision.tokens_sampled for step in self.steps),
        )

    def _draw(
        self, inserted: list[int], max_tokens: int
    ) -> Steps[tuple[Continuation | None, Decision | None]]:
        """One continuation, or why there is none."""
        length = min(max_tokens, self.left - len(inserted))
        if length < 1:
            return Continuation([], "", False), None
        context = [*self.prompt, *self.reasoning, *inserted]
        try:
            ((drawn,),) = yield Batch([self.forecaster.sampling(context, 1, length)])
        except Exception as error:
            logger.warning("Reasoning stops: writing failed: %s", error)
            kind = TIME if isinstance(error, DeadlineExceeded) else FAILURE
            return None, Decision(False, kind, failure=("writing", str(error)))
        self.tokens_sampled += len(drawn.token_ids)
        return without_stop(drawn, self.forecaster.stop, self.tokenizer), None

    def _add(self, inserted: list[int], drawn: Continuation) -> list[int]:
        """Append, within the bound; returns the drawn tokens that were."""
        self.reasoning += inserted
        added = list(drawn.token_ids[: max(self.left, 0)])
        self.reasoning += added
        whole = len(added) == len(drawn.token_ids)
        # Where nothing is written, nothing would be the next time.
        self.ended = (drawn.finished and whole) or not drawn.token_ids
        return added

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _last_posterior(self) -> AnswerPosterior | None:
        found = [s.decision.posterior for s in self.steps if s.decision.posterior is not None]
        return found[-1] if found else None
