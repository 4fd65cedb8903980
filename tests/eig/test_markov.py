"""The whole decision on a reasoner whose expected information gain is known exactly."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from tests.eig.markov import MarkovReasoner, random_reasoner
from vllm.score.eig import (
    AnswerFormat,
    AnswerPosteriorEstimator,
    Decision,
    ExpectedInformationGainCalculator,
    GivenCandidates,
    MonteCarloForecaster,
    State,
)

FORMAT = AnswerFormat(cue="?", end=".")


def calculator(
    reasoner: MarkovReasoner, samples: int, length: int, **options: object
) -> ExpectedInformationGainCalculator:
    estimator = AnswerPosteriorEstimator(
        GivenCandidates(reasoner.names),
        reasoner.tokenizer,
        beam_size=20,
        answer_format=FORMAT,
    )
    forecaster = MonteCarloForecaster(
        estimator, mc_samples=samples, sample_length=length, temperature=1.0, top_p=1.0
    )
    return ExpectedInformationGainCalculator(forecaster, **options)


def decide(
    rule: ExpectedInformationGainCalculator, reasoner: MarkovReasoner, chain: list[int]
) -> Decision:
    return asyncio.run(rule.decide(reasoner, State(chain)))


@pytest.mark.parametrize("seed", range(3))
def test_the_posterior_is_exact(seed):
    reasoner = random_reasoner(answers=5, states=4, seed=seed)
    chain = [0, 2, 1, 1]
    found = decide(calculator(reasoner, 2, 1), reasoner, chain).posterior
    assert found.answers == reasoner.names
    np.testing.assert_allclose(np.exp(found.log_posterior), reasoner.posterior(chain), atol=1e-6)
    assert found.entropy == pytest.approx(reasoner.entropy(chain), abs=1e-6)
    assert found.coverage == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("estimator", ["entropy_difference", "mutual_information"])
@pytest.mark.parametrize("seed", range(2))
def test_the_estimate_converges_at_the_rate_of_its_standard_error(seed, estimator):
    """Over 200 decisions: no bias, the spread is s / sqrt(n), and the error reported is it."""
    reasoner = random_reasoner(answers=4, states=4, seed=seed, sharpness=2.0)
    chain, length = [0, 3], 2
    exact, deviation = reasoner.gain(chain, length)
    assert exact > 0.05 and deviation > 0.05
    spreads = {}
    for samples in (5, 20):
        rule = calculator(reasoner, samples, length, estimator=estimator, lambda_cost=0.0)
        found = [decide(rule, reasoner, chain).estimate for _ in range(200)]
        gains = np.array([e.gain for e in found])
        spreads[samples] = gains.std(ddof=1)
        error = spreads[samples] / math.sqrt(len(gains))
        bias = 0.0 if estimator == "entropy_difference" else 0.01 / samples
        assert abs(gains.mean() - exact) < 4 * error + bias
        if estimator == "entropy_difference":
            # 200 draws know a standard deviation to 5 %.
            assert spreads[samples] == pytest.approx(deviation / math.sqrt(samples), rel=0.2)
        reported = math.sqrt(np.mean([e.standard_error**2 for e in found]))
        assert reported == pytest.approx(spreads[samples], rel=0.25)
    assert spreads[5] / spreads[20] == pytest.approx(2.0, rel=0.25)


def test_decisions_match_the_exact_rule_away_from_the_threshold():
    """Wherever the exact gain is 4 standard errors from the cost, the verdict is the exact one."""
    checked = {True: 0, False: 0}
    for seed in range(40):
        reasoner = random_reasoner(answers=3, states=3, seed=seed, sharpness=1.5)
        chain = [0, seed % 3, (seed + 1) % 3]
        exact, deviation = reasoner.gain(chain, 2)
        for cost in (0.02, 0.1, 0.3):
            if abs(exact - cost) < 4 * deviation / math.sqrt(20) + 1e-6:
                continue
            rule = calculator(reasoner, 20, 2, lambda_cost=cost)
            decision = decide(rule, reasoner, chain)
            assert decision.go_on == (exact > cost), (seed, cost, exact)
            checked[exact > cost] += 1
    assert checked[True] >= 10 and checked[False] >= 10


def test_all_forecasts_are_scored_in_one_batch_over_the_same_answers():
    reasoner = random_reasoner(answers=3, states=3, seed=1)
    decide(calculator(reasoner, 6, 4, lambda_cost=0.0), reasoner, [0, 1])
    now, drawn, after = reasoner.batches
    assert len(now.work) == 1 and drawn.work[0].count == 6
    assert len({tuple(work.context) for work in after.work}) == len(after.work) <= 6
    assert all(work.targets == now.work[0].targets for work in after.work)


def test_no_forecast_where_the_entropy_is_no_more_than_the_cost():
    reasoner = random_reasoner(answers=3, states=3, seed=2)
    entropy = reasoner.entropy([0, 1])
    decision = decide(calculator(reasoner, 6, 4, lambda_cost=entropy + 1e-3), reasoner, [0, 1])
    assert not decision.go_on and decision.reason == "cost" and decision.forecast is None
    assert decision.tokens_sampled == 0 and len(reasoner.batches) == 1
