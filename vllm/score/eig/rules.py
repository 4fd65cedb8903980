"""When to stop reasoning: rules, each one object whose fields are its parameters.

To add one, subclass `StoppingRule` and register it:

    @settings
    class Patience(StoppingRule):
        patience: Annotated[Whole, Field(ge=1, le=99, description="steps to take")] = 3

        async def decide(self, point: DecisionPoint) -> Decision:
            steps = -(-point.position // self.sample_length)
            return Decision(steps < self.patience, GAIN if steps < self.patience else COST)

    register_scaler("patience", Patience)

`reason(llm, questions, rule=Patience(patience=5))`, `vllm-score eig --scaler patience --patience 5`
and lm-eval's `scale_func_name=patience,patience=5` then know it, with its help and bounds. Rules of
an installed package are registered by its entry points of the group `vllm_score.rules`.
"""

from __future__ import annotations

import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from importlib.metadata import entry_points
from numbers import Real
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import Field
from pydantic.fields import FieldInfo

from vllm.score.checks import Number, Whole, check_name, describe, limits_of, settings
from vllm.score.eig.candidates import State
from vllm.score.eig.options import Options, parameters_of
from vllm.score.eig.posterior import MonteCarloForecaster, check_draws, gain_estimate
from vllm.score.eig.records import (
    BUDGET,
    COST,
    FAILURE,
    GAIN,
    TIME,
    AnswerPosterior,
    Batch,
    DeadlineExceeded,
    Decision,
    Forecast,
    Reasoner,
    Sample,
    Score,
    ends_everything,
)
from vllm.score.errors import ScoreModeError

logger = logging.getLogger("vllm_score.eig")

RuleClass = TypeVar("RuleClass", bound="type[StoppingRule]")
# Names that a parameter of a rule cannot have: all rules take them.
_OF_RUNS = ("strict", "debug", "concurrency", "lora_request", "use_tqdm")
RESERVED = ("scale_func_name", "scaler", *_OF_RUNS, *parameters_of(Options))


class Meter:
    """A reasoner with a time limit that notes what is asked of it.

    Attributes:
        current: the component that runs, or ran last.
        seconds: wall time by component.
        tokens_sampled, tokens_scored: over all components.
    """

    def __init__(self, reasoner: Reasoner, limit: float | None = None) -> None:
        self.tokenizer, self._reasoner = reasoner.tokenizer, reasoner
        self._deadline = None if limit is None else time.monotonic() + limit
        self.current = "rule"
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens_sampled = self.tokens_scored = 0

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Count the time within as this component's."""
        self.current = name
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    async def run(self, batch: Batch) -> list[Any]:
        """See `Reasoner.run`."""
        results = await self._reasoner.run(Batch(batch.work, self._deadline))
        for work, result in zip(batch.work, results, strict=True):
            if isinstance(work, Sample):
                self.tokens_sampled += sum(len(drawn.token_ids) for drawn in result)
            elif isinstance(work, Score):
                self.tokens_scored += sum(len(target) for target in work.targets)
        return results


@dataclass
class DecisionPoint:
    """A state of the reasoning at which a rule decides, and what it may ask of the model there.

    Attributes:
        meter: the model.
        forecaster: the policy under which reasoning goes on, and the estimator of posteriors.
        state: where the reasoning is.
        known: candidates of the decision before; the likeliest of these and new ones count.
        bridge: tokens that would come before the next step.
        position: tokens of reasoning so far.
        found, forecasts: what was asked for already.
    """

    meter: Meter
    forecaster: MonteCarloForecaster
    state: State
    known: Sequence[str] = ()
    bridge: Sequence[int] = ()
    position: int = 0
    found: AnswerPosterior | None = None
    forecasts: Forecast | None = None

    async def posterior(self) -> AnswerPosterior:
        """Of the answer, now."""
        if self.found is None:
            estimator = self.forecaster.estimator
            with self.meter.component("candidates"):
                new = await estimator.propose(self.meter, self.state)
            with self.meter.component("posterior"):
                answers = list(dict.fromkeys([*new, *self.known]))
                self.found = await estimator.posterior(self.meter, self.state, answers)
        return self.found

    async def forecast(self, samples: int) -> Forecast:
        """The posteriors after `samples` continuations that the model writes; one is the next step
        if reasoning goes on."""
        answers = (await self.posterior()).answers
        context = [*self.state.token_ids, *self.bridge]
        with self.meter.component("sampling"):
            drawn = await self.forecaster.draw(self.meter, context, samples)
        with self.meter.component("scoring"):
            self.forecasts = await self.forecaster.score(self.meter, context, answers, drawn)
        return self.forecasts


async def decided(
    point: DecisionPoint, verdict: Callable[[DecisionPoint], Awaitable[Decision]] | None
) -> Decision:
    """A verdict with what it rests on and what it cost; if it fails or is late, one to stop.

    Where reasoning stops, its answer is asked for, whatever the rule has asked.

    Args:
        verdict: None where no step can follow.
    """
    meter = point.meter
    try:
        decision = Decision(False, BUDGET) if verdict is None else await verdict(point)
        if not decision.go_on and decision.posterior is None:
            await point.posterior()
    except Exception as error:
        decision = failed(error, meter.current)
    return replace(
        decision,
        posterior=decision.posterior or point.found,
        forecast=decision.forecast or point.forecasts,
        seconds=dict(meter.seconds),
        tokens_sampled=meter.tokens_sampled,
        tokens_scored=meter.tokens_scored,
    )


def failed(error: Exception, component: str) -> Decision:
    """The decision to stop because of an error; one that `ends_everything` is raised."""
    if ends_everything(error):
        raise error
    reason = TIME if isinstance(error, DeadlineExceeded) else FAILURE
    logger.warning("Reasoning stops: %s failed (%s): %s", component, reason, error)
    return Decision(False, reason, failure=(component, str(error)))


@settings
class StoppingRule(ABC):
    """Decides whether to take one more step. Its fields are its parameters.

    Attributes:
        beam_size: number of candidate answers.
        sample_length: length of a step and of a continuation, tokens.
        temperature: of the continuations.
        top_p: probability mass that continuations are sampled from.
        max_computation_time: time limit of a decision, seconds.

    Raises:
        ScoreModeError: a value out of range; `checked` takes the nearest one instead.
    """

    beam_size: Annotated[Whole, Field(ge=1, le=20)] = 8
    sample_length: Annotated[Whole, Field(ge=1, le=512)] = 64
    temperature: Annotated[Number, Field(ge=0.1, le=2)] = 1.0
    top_p: Annotated[Number, Field(ge=0.1, le=1)] = 0.9
    max_computation_time: Annotated[Number, Field(ge=1, le=300)] = 30.0

    @abstractmethod
    async def decide(self, point: DecisionPoint) -> Decision:
        """Whether to go on. Not asked where no step can follow.

        What `point` was asked for is added to the decision; an exception is a decision to stop.
        """

    @property
    def cost(self) -> float | None:
        """Of a step, in nats; None for rules that do not weigh gains."""
        return None

    def budget(self, most: int | None) -> int | None:
        """Tokens of reasoning at most; `most` of them are asked for, None: by nobody."""
        return most

    @classmethod
    def parameters(cls) -> dict[str, FieldInfo]:
        """By name, as declared."""
        return parameters_of(cls)

    @classmethod
    def checked(cls, strict: bool = False, **values: Any) -> Self:
        """From values as users write them.

        Whole numbers may come as "8" or 8.0, others as "0.03", as command lines hand them on. A
        number out of range becomes the nearest end, with one warning (`RuntimeWarning` and log
        record) for each that names the parameter, both values and the range.

        Args:
            strict: refuse what is out of range.

        Raises:
            ScoreModeError: an unknown name, no number (a bool and NaN are none), a fraction for a
                whole number; with `strict` a number out of range. It lists all of them.
        """
        known = cls.parameters()
        corrections: list[str] = []
        for name, given in list(values.items()):
            kind: Any = known[name].annotation if name in known else None
            number = _number(given, kind)
            if kind is None or number is None:  # no number is asked for, or none is given
                continue
            limits = limits_of(known[name].rebuild_annotation())
            nearest = min(max(number, limits.get("ge", number)), limits.get("le", number))
            if nearest == number:
                values[name] = kind(number)
            elif not strict:
                values[name] = kind(nearest)
                corrections.append(
                    f"{name} is {given!r}, and must be {describe(known[name])}; corrected to "
                    f"{values[name]!r}."
                )
        rule = cls(**values)
        for message in corrections:
            logger.warning(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return rule

    @classmethod
    def split(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values of parameters of this rule, and the rest."""
        own = {name: given[name] for name in cls.parameters() if name in given}
        return own, {name: value for name, value in given.items() if name not in own}


@settings
class ExpectedInformationGain(StoppingRule):
    """Go on as long as EIG_t = H_t - E[H_{t+1}] is above what a step costs.

    Attributes:
        lambda_cost: cost of one more step, nats.
        mc_samples: continuations sampled for a forecast.
        estimator: of the gain.
    """

    lambda_cost: Annotated[Number, Field(ge=0, le=10)] = 0.05
    mc_samples: Annotated[Whole, Field(ge=1, le=20)] = 5
    estimator: Literal["entropy_difference", "mutual_information"] = "entropy_difference"

    def __post_init__(self) -> None:
        check_draws(self.estimator, self.mc_samples)

    @property
    def cost(self) -> float | None:
        return self.lambda_cost

    async def decide(self, point: DecisionPoint) -> Decision:
        return await _weigh(point, self.mc_samples, self.lambda_cost, self.estimator)


@settings
class EntropyThreshold(StoppingRule):
    """Go on as long as the entropy of the answer is above a threshold; no forecasts.

    Attributes:
        entropy_threshold: entropy to stop at, nats.
    """

    entropy_threshold: Annotated[Number, Field(ge=0, le=10)] = 0.5

    async def decide(self, point: DecisionPoint) -> Decision:
        go_on = (await point.posterior()).entropy > self.entropy_threshold
        return Decision(go_on, GAIN if go_on else COST)


@settings
class FixedBudget(StoppingRule):
    """Go on until the tokens are spent; the answer's posterior is taken then alone.

    Attributes:
        fixed_budget: length of the reasoning, tokens.
    """

    fixed_budget: Annotated[Whole, Field(ge=0, le=1_000_000)] = 256

    def budget(self, most: int | None) -> int | None:
        return self.fixed_budget if most is None else min(self.fixed_budget, most)

    async def decide(self, point: DecisionPoint) -> Decision:
        return Decision(True, GAIN)


@dataclass(frozen=True)
class ExpectedInformationGainCalculator:
    """The rule of `ExpectedInformationGain` at single states, with a forecaster of one's own.

    Attributes:
        forecaster: and with it the estimator.
        lambda_cost: in nats per step.
        estimator: of the gain, see `vllm.score.eig.posterior`.
        max_computation_time: seconds for a decision; None: no limit.

    Raises:
        ScoreModeError: an unknown estimator, or one that needs more forecasts.
    """

    forecaster: MonteCarloForecaster
    _: KW_ONLY
    lambda_cost: float = 0.05
    estimator: str = "entropy_difference"
    max_computation_time: float | None = 30.0

    def __post_init__(self) -> None:
        check_draws(self.estimator, self.forecaster.mc_samples)

    async def decide(
        self, reasoner: Reasoner, state: State, known: Sequence[str] = (), final: bool = False
    ) -> Decision:
        """Whether one more step pays at a state; whatever fails is a decision to stop.

        Args:
            known: candidates of the decision before; the likeliest of these and new ones count.
            final: no step can follow: the posterior alone.
        """
        meter = Meter(reasoner, self.max_computation_time)
        point = DecisionPoint(meter, self.forecaster, state, known)
        parameters = self.forecaster.mc_samples, self.lambda_cost, self.estimator
        return await decided(point, None if final else lambda at: _weigh(at, *parameters))


def _number(given: Any, kind: Any) -> float | None:
    """A number of this type as users write it, e.g. "8" or 8.0 for 8; None where it is none."""
    try:
        number: Any = float(given) if isinstance(given, str) else given
    except ValueError:
        return None
    if kind not in (int, float) or isinstance(number, bool) or not isinstance(number, Real):
        return None
    wrong = number != number or (kind is int and number % 1)
    return None if wrong else cast(float, number)


async def _weigh(point: DecisionPoint, samples: int, cost: float, estimator: str) -> Decision:
    posterior = await point.posterior()
    if estimator == "entropy_difference" and posterior.entropy <= cost:
        return Decision(False, COST)  # no draws could find a difference above H_t
    forecast = await point.forecast(samples)
    estimate = gain_estimate(posterior.entropy, forecast.log_posteriors, estimator)
    go_on = estimate.gain > cost
    return Decision(go_on, GAIN if go_on else COST, estimate=estimate)


RULES: dict[str, type[StoppingRule]] = {
    "expected_information_gain_reasoning": ExpectedInformationGain,
    "entropy_threshold_reasoning": EntropyThreshold,
    "fixed_budget_reasoning": FixedBudget,
}


def register_scaler(name: str, rule: RuleClass, *, replace: bool = False) -> RuleClass:
    """Make a rule known under a name, to `vllm-score eig --scaler` and lm-eval's `scale_func_name`.

    Args:
        rule: the class; a `@settings` subclass of `StoppingRule`.
        replace: the name may be taken.

    Raises:
        ScoreModeError: the name is taken, `rule` is no such class, or it has a parameter that is
            named like an option of all rules.
    """
    if name in RULES and not replace:
        raise ScoreModeError(
            f"A scaler {name!r} is registered already; choose another name or set replace=True."
        )
    if not (isinstance(rule, type) and issubclass(rule, StoppingRule)):
        raise ScoreModeError(
            f"The scaler {name!r} is {rule!r}; give a subclass of StoppingRule with @settings."
        )
    if taken := [each for each in rule.parameters() if each in RESERVED]:
        raise ScoreModeError(
            f"The scaler {name!r} names its parameters {', '.join(taken)} like options that all "
            "scalers take; rename them."
        )
    RULES[name] = rule
    return rule


def all_rules() -> dict[str, type[StoppingRule]]:
    """`RULES`, with those that installed packages have as entry points `vllm_score.rules`.

    Raises:
        ScoreModeError: one that cannot be loaded.
    """
    for entry in entry_points(group="vllm_score.rules"):
        if entry.name not in RULES:
            try:
                register_scaler(entry.name, entry.load())
            except Exception as error:
                raise ScoreModeError(
                    f"The scaler {entry.name!r} of an installed package, {entry.value}, cannot be "
                    f"loaded: {error}; mend or remove the package."
                ) from error
    return RULES


def find_rule(name: Any) -> type[StoppingRule]:
    """A rule by its name.

    Raises:
        ScoreModeError: there is none; names the nearest.
    """
    check_name("scaler", name, all_rules())
    return RULES[name]
