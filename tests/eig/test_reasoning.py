"""The loop: bounds, ends, prompts, failures, the time limit; on the exact reasoner."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.eig.markov import MarkovReasoner, random_reasoner
from vllm.score.checks import settings
from vllm.score.eig import (
    AnswerFormat,
    AnswerPosteriorEstimator,
    ContinuationPrompts,
    Decision,
    DecisionPoint,
    EIGMetrics,
    EntropyThreshold,
    ExpectedInformationGain,
    ExpectedInformationGainCalculator,
    FixedBudget,
    GivenCandidates,
    MonteCarloForecaster,
    Options,
    StoppingRule,
    Trace,
    eig_problems,
)
from vllm.score.eig.posterior import without_stop
from vllm.score.eig.reasoning import describe
from vllm.score.eig.records import (
    Batch,
    Continuation,
    DeadlineExceeded,
    Forecast,
    GainEstimate,
    Sample,
)
from vllm.score.errors import ScoreModeError

PROMPTS = ContinuationPrompts(large="a", moderate="b", small="c", neutral="a")
LENGTH = 3


def parts(reasoner: MarkovReasoner) -> tuple[AnswerPosteriorEstimator, MonteCarloForecaster]:
    estimator = AnswerPosteriorEstimator(
        GivenCandidates(reasoner.names),
        reasoner.tokenizer,
        answer_format=AnswerFormat(cue="?", end="."),
    )
    return estimator, MonteCarloForecaster(
        estimator, mc_samples=4, sample_length=LENGTH, temperature=1.0, top_p=1.0
    )


STEP: dict[str, Any] = {"sample_length": LENGTH, "temperature": 1.0, "top_p": 1.0}


@settings
class Gain(ExpectedInformationGain):
    """With time limits that a test can wait for."""

    max_computation_time: float | None = 30.0


def run(
    reasoner: MarkovReasoner,
    rule: StoppingRule | None = None,
    metrics: EIGMetrics | None = None,
    cost: float = 0.0,
    limit: float | None = 30.0,
    **options: Any,
) -> Trace:
    if rule is None:
        rule = Gain(lambda_cost=cost, mc_samples=4, max_computation_time=limit, **STEP)
    asked = Options(
        **{
            "prompts": PROMPTS,
            "candidates": reasoner.names,
            "answer_cue": "?",
            "answer_end": ".",
            "metrics": metrics or EIGMetrics(),
            **options,
        }
    )
    (problem,) = eig_problems(reasoner.tokenizer, [[0, 1]], rule, options=asked)
    return asyncio.run(problem(reasoner))


@settings
class Always(StoppingRule):
    """Goes on for ever, if it is let."""

    sample_length: int = LENGTH
    top_p: float = 1.0
    estimate: GainEstimate | None = None
    forecast: Forecast | None = None
    lambda_cost: float = 0.1

    @property
    def cost(self) -> float:
        return self.lambda_cost

    async def decide(self, point: DecisionPoint) -> Decision:
        return Decision(True, "gain", estimate=self.estimate, forecast=self.forecast)


def test_reasoning_stops_where_the_gain_falls_below_the_cost():
    reasoner = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0)
    metrics = EIGMetrics()
    trace = run(reasoner, cost=0.12, metrics=metrics, max_tokens_thinking=300)
    *gone_on, last = trace.steps
    assert gone_on and all(s.decision.estimate.gain > 0.12 for s in gone_on)
    assert last.decision.reason == "cost" and not last.decision.go_on
    assert len(trace.reasoning_token_ids) == LENGTH * len(gone_on) < 300
    assert [s.position for s in trace.steps] == [LENGTH * i for i in range(len(trace.steps))]
    assert trace.reasoning == "".join(s.prompt + s.text for s in trace.steps)
    chain = [*trace.prompt_token_ids, *trace.reasoning_token_ids]
    assert trace.answer == reasoner.names[int(np.argmax(reasoner.posterior(chain)))]
    want = [reasoner.entropy(chain[: 2 + s.position]) for s in trace.steps]
    np.testing.assert_allclose(trace.entropies, want, atol=1e-6)
    assert metrics.summary()["decisions"] == len(trace.steps)
    assert metrics.summary()["continued"] == len(gone_on)


def test_a_step_is_one_of_its_forecasts_and_no_token_is_drawn_twice():
    reasoner = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0)
    trace = run(reasoner, cost=0.1)
    for step in trace.steps[:-1]:
        assert step.text in [c.text for c in step.decision.forecast.continuations]
    drawn = sum(w.count * LENGTH for b in reasoner.batches for w in b.work if isinstance(w, Sample))
    assert trace.tokens_sampled == drawn
    assert drawn == 4 * LENGTH * sum(s.decision.forecast is not None for s in trace.steps)


def test_the_choice_among_forecasts_is_uniform_and_seeded():
    """The draws of the reasoner are the same each time; what differs is the choice."""
    chosen = []
    for seed in range(120):
        reasoner = random_reasoner(answers=4, states=6, seed=3, sharpness=0.1)
        trace = run(reasoner, cost=0.0, seed=seed, max_tokens_thinking=LENGTH)
        texts = [c.text for c in trace.steps[0].decision.forecast.continuations]
        assert len(set(texts)) == 4
        chosen.append(texts.index(trace.steps[0].text))
    counts = np.bincount(chosen, minlength=4)
    assert ((counts - 30) ** 2 / 30).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001
    again = random_reasoner(answers=4, states=6, seed=3, sharpness=0.1)
    assert run(again, seed=119, max_tokens_thinking=LENGTH).reasoning == trace.reasoning


@pytest.mark.parametrize("budget", [0, 1, 3, 4, 17])
def test_the_budget_is_never_exceeded(budget):
    reasoner = random_reasoner(answers=3, states=3, seed=1)
    trace = run(reasoner, Always(), max_tokens_thinking=budget)
    assert len(trace.reasoning_token_ids) == budget


def test_a_rule_that_asks_nothing_gets_an_answer():
    @settings
    class Short(StoppingRule):
        async def decide(self, point: DecisionPoint) -> Decision:
            return Decision(point.position == 0, "gain")

    reasoner = random_reasoner(answers=3, states=3, seed=1)
    trace = run(reasoner, Short(**STEP))
    assert len(trace.reasoning_token_ids) == LENGTH and [len(trace.steps)] == [2]
    chain = [0, 1, *trace.reasoning_token_ids]
    assert trace.answer == reasoner.names[int(np.argmax(reasoner.posterior(chain)))]


def test_a_rule_that_never_stops_ends_with_the_bound_on_overruling():
    """The reasoner writes nothing more, whatever it is told: 4 prompts, then an end."""
    reasoner = random_reasoner(answers=3, states=3, seed=1, ends_after=2)
    trace = run(reasoner, FixedBudget(**STEP), thinking_n_ignore=4)
    assert trace.reasoning == "aaaa" and trace.ended
    assert trace.steps[-1].decision.reason == "ended"
    assert [s.prompt for s in trace.steps] == ["", "a", "a", "a", "a", ""]


@pytest.mark.parametrize("ignore", [0, 1, 3])
def test_the_model_is_overruled_so_often(ignore):
    reasoner = random_reasoner(answers=3, states=3, seed=1, ends_after=6)
    trace = run(reasoner, Always(), thinking_n_ignore=ignore)
    assert sum(step.prompt != "" for step in trace.steps) == ignore
    assert len(trace.reasoning_token_ids) == 4 + ignore and trace.ended


@pytest.mark.parametrize(("gain", "prompt"), [(0.31, "b"), (0.2, "c"), (0.11, "d")])
def test_the_prompt_is_chosen_by_the_gain(gain, prompt):
    prompts = replace(PROMPTS, large="b", moderate="c", small="d", neutral="a")
    reasoner = random_reasoner(answers=4, states=4, seed=3, ends_after=4)
    rule = Always(estimate=GainEstimate(1.0, 1.0 - gain, gain, 0.1, gain, gain))
    trace = run(reasoner, rule, thinking_n_ignore=1, prompts=prompts)
    assert [step.prompt for step in trace.steps] == ["", prompt, ""]
    assert trace.reasoning == trace.steps[0].text + prompt


def test_a_forecast_behind_another_prompt_is_no_step():
    """Forecasts are made behind the neutral prompt; behind another one the step is drawn anew."""
    prompts = replace(PROMPTS, large="b", moderate="c", small="c", neutral="a")
    reasoner = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0, ends_after=4)
    estimate = GainEstimate(1.0, 0.0, 1.0, 0.1, 1.0, 1.0)
    forecast = Forecast([Continuation([0], "a", True)], np.zeros((1, 1)), np.zeros(1))
    for text, asked in [("a", 0), ("b", 1)]:
        rule = Always(estimate=estimate, forecast=forecast)
        run(reasoner, rule, thinking_n_ignore=1, prompts=replace(prompts, large=text))
        assert sum(isinstance(w, Sample) for b in reasoner.batches for w in b.work) == asked
        reasoner.batches.clear()


def test_deciding_at_the_end_only():
    reasoner = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0, ends_after=20)
    trace = run(reasoner, cost=5.0, decide_at="end")
    assert len(trace.steps) == 1 and trace.steps[0].position == 18 and trace.ended
    assert trace.tokens_sampled == 18


def test_the_entropy_threshold():
    reasoner = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0)
    rule = EntropyThreshold(entropy_threshold=0.3, **STEP)
    trace = run(reasoner, rule, max_tokens_thinking=500)
    assert (trace.entropies[:-1] > 0.3).all() and trace.entropies[-1] <= 0.3
    assert trace.steps[-1].decision.reason == "cost"
    assert trace.tokens_sampled == len(trace.reasoning_token_ids)


def test_the_fixed_budget():
    reasoner = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0)
    trace = run(reasoner, FixedBudget(fixed_budget=10, **STEP))
    assert len(trace.reasoning_token_ids) == 10 == trace.tokens_sampled
    assert trace.steps[-1].decision.reason == "budget" and trace.answer is not None


class Failing(MarkovReasoner):
    """Raises at a batch."""

    def __init__(self, at: int, error: Exception, **options: Any) -> None:
        healthy = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0)
        super().__init__(healthy.prior, healthy.transitions, 3, **options)
        self.at, self.error, self.count = at, error, 0

    async def run(self, batch: Batch) -> list[Any]:
        self.count += 1
        if self.count == self.at:
            raise self.error
        return await super().run(batch)


@pytest.mark.parametrize(
    ("at", "component"), [(1, "posterior"), (2, "sampling"), (3, "scoring"), (4, "posterior")]
)
@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("the engine died"), "failure"), (DeadlineExceeded("too late"), "time")],
)
def test_a_failure_stops_and_is_counted_and_logged(at, component, error, reason, caplog):
    metrics = EIGMetrics()
    reasoner = Failing(at, error)
    trace = run(reasoner, cost=1e-6, metrics=metrics)
    last = trace.steps[-1].decision
    assert not last.go_on and last.reason == reason and last.failure == (component, str(error))
    assert metrics.summary()["failures"][component][reason] == 1
    assert str(error) in caplog.text and component in caplog.text
    assert reasoner.count == at  # nothing was asked afterwards
    # What was known before the failure is kept.
    assert (trace.answer is None) == (at == 1)
    assert str(error) in describe(last)


def test_a_failure_while_writing_stops_too():
    metrics = EIGMetrics()
    reasoner = Failing(1, RuntimeError("no memory"))
    trace = run(reasoner, Always(), metrics=metrics, max_tokens_thinking=5)
    assert trace.steps[-1].decision.failure == ("writing", "no memory")
    assert trace.answer is None and trace.reasoning == ""
    assert metrics.summary()["failures"]["writing"]["failure"] == 1
    reasoner = Failing(1, RuntimeError("no memory"), ends_after=5)
    assert run(reasoner, decide_at="end").steps[-1].decision.reason == "failure"


def test_candidates_that_fail_are_a_failure_of_that_component():
    class Broken:
        async def propose(self, reasoner, state, count, form):
            raise ScoreModeError("no candidates today")

    trace = run(random_reasoner(answers=4, states=3, seed=3), candidates=Broken())
    assert trace.steps[-1].decision.failure == ("candidates", "no candidates today")


def test_the_time_limit_reaches_every_batch_of_a_decision():
    class Slow(MarkovReasoner):
        async def run(self, batch: Batch) -> list[Any]:
            time.sleep(0.05)
            if batch.deadline is not None and time.monotonic() > batch.deadline:
                raise DeadlineExceeded("the time limit of this decision has passed")
            return await super().run(batch)

    healthy = random_reasoner(answers=4, states=3, seed=3, sharpness=2.0)
    reasoner = Slow(healthy.prior, healthy.transitions)
    before = time.monotonic()
    trace = run(reasoner, cost=0.0, limit=0.12)
    assert trace.steps[-1].decision.reason == "time"
    deadlines = {batch.deadline for batch in reasoner.batches}
    assert len(deadlines) == 1 and before + 0.12 <= deadlines.pop() <= before + 0.5
    free = Slow(healthy.prior, healthy.transitions)
    assert run(free, cost=5.0, limit=None).steps[-1].decision.reason == "cost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decide_at": "sometimes"}, "decide_at must be one of step, end, got 'sometimes'"),
        ({"max_tokens_thinking": -1}, "max_tokens_thinking must be a whole number of at least 0"),
        ({"thinking_n_ignore": 1.5}, "thinking_n_ignore must be a whole number of at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ScoreModeError, match=message):
        Options(**options)


def test_estimators_and_normalisations_are_checked():
    reasoner = random_reasoner(answers=2, states=2, seed=0)
    estimator, forecaster = parts(reasoner)
    with pytest.raises(ScoreModeError, match="estimator 'median' is unknown"):
        ExpectedInformationGainCalculator(forecaster, estimator="median")
    forecaster.mc_samples = 1
    with pytest.raises(ScoreModeError, match="mc_samples is 1"):
        ExpectedInformationGainCalculator(forecaster, estimator="mutual_information")
    with pytest.raises(ScoreModeError, match="mc_samples is 1"):
        ExpectedInformationGain(mc_samples=1, estimator="mutual_information")
    with pytest.raises(ScoreModeError, match="length_normalization 'words' is unknown"):
        AnswerPosteriorEstimator(
            estimator.candidates, reasoner.tokenizer, length_normalization="words"
        )


def test_the_text_that_ends_the_reasoning_is_taken_off():
    class Letters:
        def decode(self, ids):
            return "".join(chr(i) for i in ids)

    ids = [ord(c) for c in "so 5</think>"]
    cut = without_stop(Continuation(ids, "so 5</think>", True), ["</think>"], Letters())
    # The tag's last letter completes it; its other letters are reasoning that was cut there.
    assert cut.finished and "</think>" not in cut.text
    untouched = Continuation([1], "x", True)
    assert without_stop(untouched, ["</think>"], Letters()) is untouched
