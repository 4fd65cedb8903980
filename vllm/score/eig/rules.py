"""When to stop reasoning: what the loop asks, and the rules that EIG is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from vllm.score.eig.candidates.source import State
from vllm.score.eig.core import AnswerPosteriorEstimator, posterior_decision
from vllm.score.eig.types import BUDGET, COST, GAIN, Decision
from vllm.score.eig.work import Steps


class StoppingRule(Protocol):
    """Decides whether to take one more step; `ExpectedInformationGainCalculator` is one."""

    def decide_steps(
        self,
        state: State,
        known: Sequence[str] = (),
        bridge: Sequence[int] = (),
        final: bool = False,
    ) -> Steps[Decision]:
        """See `ExpectedInformationGainCalculator.decide_steps`."""
        ...


class EntropyThreshold:
    """Go on as long as the answer's entropy is above a threshold.

    Args:
        estimator: of the posterior.
        threshold: in nats.
        max_computation_time: seconds for a decision; None: no limit.
    """

    def __init__(
        self,
        estimator: AnswerPosteriorEstimator,
        threshold: float = 0.5,
        max_computation_time: float | None = 30.0,
    ) -> None:
        self.estimator, self.threshold = estimator, threshold
        self.max_computation_time = max_computation_time

    def decide_steps(
        self,
        state: State,
        known: Sequence[str] = (),
        bridge: Sequence[int] = (),
        final: bool = False,
    ) -> Steps[Decision]:
        """The decision; a failure stops."""
        decision = yield from posterior_decision(
            self.estimator, state, known, self.max_computation_time
        )
        posterior = decision.posterior
        if decision.failure is not None or posterior is None:
            return decision
        go_on = not final and posterior.entropy > self.threshold
        return replace(decision, go_on=go_on, reason=_reason(go_on, final))


class FixedBudget:
    """Go on until the tokens are spent; the answer's posterior is taken then alone.

    Args:
        estimator: of the posterior.
        max_computation_time: seconds for a decision; None: no limit.
    """

    def __init__(
        self, estimator: AnswerPosteriorEstimator, max_computation_time: float | None = 30.0
    ) -> None:
        self.estimator, self.max_computation_time = estimator, max_computation_time

    def decide_steps(
        self,
        state: State,
        known: Sequence[str] = (),
        bridge: Sequence[int] = (),
        final: bool = False,
    ) -> Steps[Decision]:
        """The decision; a failure stops."""
        if not final:
            return Decision(True, GAIN)
        return (
            yield from posterior_decision(self.estimator, state, known, self.max_computation_time)
        )


def _reason(go_on: bool, final: bool) -> str:
    return GAIN if go_on else BUDGET if final else COST
