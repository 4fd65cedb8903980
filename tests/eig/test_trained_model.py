"""The estimate on a trained model and the real engine, against the exact expectation.

A step is one token of a vocabulary of 97, so the expectation is a sum over all of them: their
probabilities, and the answer's entropy behind each, are computed by Hugging Face in float64.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from vllm.score.eig import (
    AnswerFormat,
    AnswerPosteriorEstimator,
    BeamCandidates,
    EngineDriver,
    ExpectedInformationGainCalculator,
    GivenCandidates,
    MonteCarloForecaster,
    State,
)
from vllm.score.tiny.additions import AdditionsRecipe, additions_model, random_problems

pytestmark = pytest.mark.engine

# Enough to add up two numbers; far from the default's skill, and quick.
RECIPE = AdditionsRecipe(steps=250, sequences=32)
# Nats; on a GPU float32 products may run in TF32.
TOLERANCE = 1e-2 if torch.cuda.is_available() else 1e-4
# Of its own accord the model hardly hesitates between two sums.
TEMPERATURE = 2.0
ENGINES: list[Any] = []  # an engine that dies takes the others of the process along


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return additions_model(tmp_path_factory.mktemp("cache"), False, recipe=RECIPE).directory


@pytest.fixture(scope="module")
def trained(folder):
    from vllm import LLM

    ENGINES.append(
        LLM(
            str(folder),
            dtype="float32",
            max_model_len=128,
            enforce_eager=True,
            distributed_executor_backend="uni",
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=64 << 20,
            max_num_seqs=64,
        )
    )
    return ENGINES[-1]


class Exact:
    """What the model itself says, in float64."""

    def __init__(self, folder: Any, tokenizer: Any, answers: list[str]) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = tokenizer
        self.cue = tokenizer.encode("\n\nThe answer is:")
        # One token each, so that they exclude each other without an end.
        self.answers = [tokenizer.encode(f" {answer}")[0] for answer in answers]

    def log_softmax(self, rows: list[list[int]]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor(rows)).logits.log_softmax(-1).numpy()

    def entropies(self, states: list[list[int]]) -> np.ndarray:
        """H over the answers behind each state (all of one length)."""
        rows = self.log_softmax([[*state, *self.cue] for state in states])[:, -1]
        return stats.entropy(np.exp(rows[:, self.answers]), axis=1)

    def gain(self, ids: list[int]) -> tuple[float, float]:
        """EIG of one token, and the standard deviation of H_{t+1}."""
        now = float(self.entropies([ids])[0])
        heated = self.log_softmax([ids])[0, -1] / TEMPERATURE
        p = np.exp(heated - logsumexp(heated))
        end = self.tokenizer.eos_token_id
        tokens = [token for token in range(len(p)) if token != end]
        after = np.full(len(p), now)  # behind the end of the sequence nothing is added
        after[tokens] = self.entropies([[*ids, token] for token in tokens])
        mean = float(p @ after)
        return now - mean, math.sqrt(float(p @ (after - mean) ** 2))


ANSWERS = [str(number) for number in range(4, 40)][::2][:18]


@pytest.fixture(scope="module")
def exact(folder, trained):
    return Exact(folder, trained.get_tokenizer(), ANSWERS)


def decisions(llm: Any, states: list[list[int]], samples: int, **options: Any) -> list[Any]:
    estimator = AnswerPosteriorEstimator(
        GivenCandidates(ANSWERS),
        llm.get_tokenizer(),
        beam_size=20,
        answer_format=AnswerFormat(end=""),
    )
    forecaster = MonteCarloForecaster(
        estimator, mc_samples=samples, sample_length=1, temperature=TEMPERATURE, top_p=1.0
    )
    rule = ExpectedInformationGainCalculator(forecaster, **options)
    driver = EngineDriver(llm)
    found = dict(driver.run_all(partial(rule.decide, state=State(ids)) for ids in states))
    return [found[i] for i in range(len(states))]


def test_the_estimate_converges_to_the_model_s_own_expectation(trained, exact):
    tokenizer = trained.get_tokenizer()
    candidates = [tokenizer.encode(p.question) for p in random_problems(6, seed=5, min_terms=4)]
    ids = max(candidates, key=lambda one: exact.gain(one)[1])  # where draws differ most
    gain, deviation = exact.gain(ids)
    assert deviation > 0.05
    spread = {}
    for samples in (5, 20):
        found = decisions(trained, [ids] * 100, samples, lambda_cost=0.0)
        assert found[0].posterior.entropy == pytest.approx(exact.entropies([ids])[0], abs=TOLERANCE)
        estimates = np.array([d.estimate.gain for d in found])
        spread[samples] = estimates.std(ddof=1)
        assert abs(estimates.mean() - gain) < 4 * deviation / math.sqrt(100 * samples) + TOLERANCE
        assert spread[samples] == pytest.approx(deviation / math.sqrt(samples), rel=0.3)
    assert spread[5] / spread[20] == pytest.approx(2.0, rel=0.35)


def test_decisions_are_those_of_the_exact_rule_away_from_the_threshold(trained, exact):
    tokenizer = trained.get_tokenizer()
    states = []
    for number, problem in enumerate(random_problems(30, seed=6)):
        sums = "".join(f" {total}" for total in problem.sums[: number % 3])
        states.append(tokenizer.encode(problem.question + sums))
    gains = [exact.gain(ids) for ids in states]
    checked = {True: 0, False: 0}
    for cost in np.quantile([gain for gain, _ in gains], [0.1, 0.9]):
        found = decisions(trained, states, 20, lambda_cost=float(cost))
        for decision, (gain, deviation) in zip(found, gains, strict=True):
            if abs(gain - cost) > 4 * deviation / math.sqrt(20) + TOLERANCE:
                assert decision.go_on == (gain > cost)
                checked[gain > cost] += 1
    assert checked[True] >= 5 and checked[False] >= 5


def test_beams_find_the_likeliest_answers(trained, exact):
    """Every number of the vocabulary scored by Hugging Face, and the eight best taken."""
    tokenizer = trained.get_tokenizer()
    ids = tokenizer.encode("7+4+9+3....=")
    estimator = AnswerPosteriorEstimator(BeamCandidates(), tokenizer, beam_size=8)
    found = asyncio.run(estimator.estimate(EngineDriver(trained), State(ids)))
    numbers = [str(number) for number in range(2, 73)]
    ends = [tokenizer.encode(f" {number}\n") for number in numbers]
    rows = exact.log_softmax([[*ids, *exact.cue, *end] for end in ends])
    scores = [row[-3, answer] + row[-2, end] for row, (answer, end) in zip(rows, ends, strict=True)]
    order = np.argsort(scores)[::-1][:8]
    assert [numbers[i] for i in order] == found.answers
    np.testing.assert_allclose(found.logprobs, np.array(scores)[order], atol=10 * TOLERANCE)
