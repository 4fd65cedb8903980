"""Whole runs on the real engine, checked against Hugging Face in float64."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from vllm.score.cli.eig import keep_finished
from vllm.score.cli.inputs import Questions
from vllm.score.eig import (
    AnswerFormat,
    AnswerPosteriorEstimator,
    EIGMetrics,
    EIGParameters,
    EngineDriver,
    ExpectedInformationGainCalculator,
    GivenCandidates,
    MonteCarloForecaster,
    State,
    eig_problems,
    entropy_threshold_reasoning,
    expected_information_gain_reasoning,
    fixed_budget_reasoning,
)
from vllm.score.eig.engines import LLMReasoner
from vllm.score.eig.reasoning import run
from vllm.score.eig.records import Batch, Score
from vllm.score.errors import ScoreModeError

pytestmark = pytest.mark.engine

# Nats, of several tokens; on a GPU float32 products may run in TF32.
TOLERANCE = 1e-2 if torch.cuda.is_available() else 2e-4

ANSWERS = ["one", "two", "seven", "a list"]
QUESTIONS = ["Return the number of", "The value is not", "Raise an error if the file is"]
QUICK: dict[str, Any] = {"mc_samples": 3, "sample_length": 6, "use_tqdm": False}


@pytest.fixture(scope="module")
def exact(reference, llm):
    """`exact(ids)`: float64 log p(answer and end | ids, cue) of every answer, and token counts."""
    tokenizer = llm.get_tokenizer()

    def logprobs(ids: list[int], answers: list[str] = ANSWERS) -> tuple[np.ndarray, list[int]]:
        cue, targets = AnswerFormat().encode(tokenizer, answers)
        found = []
        for target in targets:
            rows = reference("llama", [*ids, *cue, *target])
            at = len(ids) + len(cue) - 1 + np.arange(len(target))
            found.append(rows[at, target].sum())
        return np.array(found), [len(target) for target in targets]

    return logprobs


def test_every_number_of_a_run(llm, exact):
    traces = expected_information_gain_reasoning(
        llm,
        QUESTIONS[:2],
        candidates=ANSWERS,
        lambda_cost=0.0,
        max_tokens_thinking=6,
        top_p=1.0,
        metrics=EIGMetrics(),
        **QUICK,
    )
    assert [t.prompt_token_ids for t in traces] == [
        llm.get_tokenizer().encode(q) for q in QUESTIONS[:2]
    ]
    forecasts = 0
    for trace in traces:
        for step in trace.steps:
            decision, ids = step.decision, trace.reasoning_token_ids[: step.position]
            here = [*trace.prompt_token_ids, *ids]
            logs, _ = exact(here)
            np.testing.assert_allclose(decision.posterior.logprobs, logs, atol=TOLERANCE)
            want = np.exp(logs - logsumexp(logs))
            assert decision.posterior.entropy == pytest.approx(stats.entropy(want), abs=TOLERANCE)
            assert decision.posterior.coverage == pytest.approx(
                np.exp(logs).sum(), rel=5 * TOLERANCE
            )
            if decision.forecast is None:
                continue
            after = []
            for drawn in decision.forecast.continuations:
                assert 0 < len(drawn.token_ids) <= 6
                logs, _ = exact([*here, *drawn.token_ids])
                after.append(stats.entropy(np.exp(logs - logsumexp(logs))))
            np.testing.assert_allclose(decision.forecast.entropies, after, atol=TOLERANCE)
            gain = stats.entropy(want) - np.mean(after)
            assert decision.estimate.gain == pytest.approx(gain, abs=2 * TOLERANCE)
            error = np.std(after, ddof=1) / math.sqrt(3)
            assert decision.estimate.standard_error == pytest.approx(error, abs=2 * TOLERANCE)
            assert decision.go_on == (decision.estimate.gain > 0)
            forecasts += 1
    assert forecasts >= 2


def test_a_posterior_normalised_by_length(llm, exact):
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(QUESTIONS[0])
    logs, tokens = exact(ids)
    lengths = {"tokens": tokens, "bytes": [len(a) + 1 for a in ANSWERS]}
    assert len(set(tokens)) > 1
    for name, divisor in lengths.items():
        estimator = AnswerPosteriorEstimator(
            GivenCandidates(ANSWERS), tokenizer, length_normalization=name
        )
        found = asyncio.run(estimator.estimate(EngineDriver(llm), State(ids)))
        scaled = logs / np.array(divisor)
        np.testing.assert_allclose(found.log_posterior, scaled - logsumexp(scaled), atol=TOLERANCE)
        np.testing.assert_allclose(found.logprobs, logs, atol=TOLERANCE)


def test_the_likeliest_of_more_answers_than_beams_count(llm, exact):
    answers = [f"case {letter}" for letter in "abcdefgh"]
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(QUESTIONS[1])
    estimator = AnswerPosteriorEstimator(GivenCandidates(answers[:3]), tokenizer, beam_size=3)
    rule = ExpectedInformationGainCalculator(MonteCarloForecaster(estimator, sample_length=4))
    decision = rule.decide(EngineDriver(llm), State(ids), known=answers, final=True)
    posterior = asyncio.run(decision).posterior
    logs, _ = exact(ids, answers)
    best = sorted(np.argsort(-logs)[:3].tolist())
    assert posterior.answers == [answers[i] for i in best]
    np.testing.assert_allclose(
        posterior.log_posterior, logs[best] - logsumexp(logs[best]), atol=TOLERANCE
    )


def test_the_rivals(llm):
    metrics = EIGMetrics()
    common = {"use_tqdm": False, "metrics": metrics, "sample_length": 5, "candidates": ANSWERS}
    traces = entropy_threshold_reasoning(
        llm, QUESTIONS, entropy_threshold=0.0, max_tokens_thinking=10, **common
    )
    for trace in traces:
        assert len(trace.reasoning_token_ids) == 10 or trace.ended
        assert len(trace.entropies) == len(trace.steps) and np.isnan(trace.gains).all()
    (trace,) = fixed_budget_reasoning(llm, QUESTIONS[:1], fixed_budget=7, **common)
    assert len(trace.reasoning_token_ids) == 7 and trace.answer in ANSWERS
    assert metrics.summary()["decisions"] == sum(len(t.steps) for t in [*traces, trace])


def test_candidates_that_a_model_does_not_end_are_a_counted_failure(llm):
    """A model of random weights comes to no end of an answer."""
    metrics = EIGMetrics()
    (trace,) = expected_information_gain_reasoning(
        llm, QUESTIONS[:1], beam_size=2, answer_end="~~~~~~", metrics=metrics, **QUICK
    )
    assert trace.answer is None and trace.steps[-1].decision.failure[0] == "candidates"
    assert metrics.summary()["failures"]["candidates"]["failure"] == 1


def test_out_of_range_is_corrected_with_a_warning_or_refused(llm):
    with pytest.warns(RuntimeWarning, match="mc_samples is 50, and must be .* from 1 to 20"):
        (trace,) = expected_information_gain_reasoning(
            llm,
            QUESTIONS[:1],
            candidates=ANSWERS,
            mc_samples=50,
            sample_length=2,
            max_tokens_thinking=2,
            lambda_cost=0.0,
            use_tqdm=False,
            metrics=EIGMetrics(),
        )
    assert len(trace.steps[0].decision.forecast.continuations) == 20
    with pytest.raises(ScoreModeError, match=r"mc_samples must be .* from 1 to 20, got 50"):
        expected_information_gain_reasoning(
            llm, QUESTIONS, candidates=ANSWERS, mc_samples=50, strict=True
        )


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        ("one question", {}, r"write \[questions\]"),
        ([3], {}, r"questions\[0\] is int"),
        ([[]], {}, r"questions\[0\] has no messages"),
        (["a"], {"candidates": [["x"], ["y"]]}, "candidates has 2 lists for 1 questions"),
        (["a"], {"candidates": "beams"}, "beam"),
        (["a"], {"candidates": list("abcdefghi")}, r"questions\[0\]: 9 answers .*beam_size is 8"),
        (["a", "b"], {"candidates": [["x"], ["y\nz"]]}, r"questions\[1\]: .*holds the end"),
        (["a"], {"lambda": 1}, "Options has no lambda"),
        (["a"], {"decide_at": "once"}, "decide_at must be one of step, end, got 'once'"),
        (
            ["a"],
            {"estimator": "mean"},
            "estimator must be one of .*, got 'mean'",
        ),
        (
            ["a"],
            {"length_normalization": "words"},
            "length_normalization must be one of .*, got 'words'",
        ),
        (["a" * 6000], {}, "leaves no room for a step"),
        (["a"], {"concurrency": 0}, "concurrency"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_runs(llm, questions, options, message):
    with pytest.raises(ScoreModeError, match=message):
        expected_information_gain_reasoning(llm, questions, use_tqdm=False, **options)
    assert not llm.llm_engine.has_unfinished_requests()


def test_reasoning_keeps_room_for_the_answer(llm, caplog):
    """max_model_len is 2048: what does not fit is not asked for."""
    caplog.set_level("INFO", logger="vllm_score.eig")
    (trace,) = fixed_budget_reasoning(
        llm, [[5] * 1960], fixed_budget=4000, sample_length=8, candidates=ANSWERS, use_tqdm=False
    )
    assert len(trace.reasoning_token_ids) == 2048 - 1960 - 8 - 64
    assert "max_tokens_thinking is 16 instead of 4000" in caplog.text
    assert trace.answer in ANSWERS


def test_debug_logs_each_decision(llm, caplog):
    (trace,) = entropy_threshold_reasoning(
        llm,
        QUESTIONS[:1],
        candidates=ANSWERS,
        debug=True,
        sample_length=3,
        use_tqdm=False,
        max_tokens_thinking=6,
        metrics=EIGMetrics(),
        entropy_threshold=0.1,
    )
    assert caplog.text.count("tokens of reasoning:") == len(trace.steps)


def test_what_an_interrupted_run_has_computed_is_kept(llm, tmp_path, capsys):
    """The third problem is interrupted once the first two have finished."""
    metrics = EIGMetrics()
    options: Any = {"candidates": ANSWERS, "max_tokens_thinking": 0, "metrics": metrics}
    problems = eig_problems(llm.get_tokenizer(), QUESTIONS[:2], EIGParameters(), options=options)

    async def interrupted(reasoner):
        while metrics.summary()["decisions"] < 2:
            await reasoner.run(Batch([Score([5, 6], [[7]])]))
        await reasoner.run(Batch([Score([5, 6], [[7]])]))
        raise KeyboardInterrupt

    finished: dict[int, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        run(LLMReasoner(llm), [*problems, interrupted], use_tqdm=False, finished=finished)
    assert sorted(finished) == [0, 1] and not llm.llm_engine.has_unfinished_requests()
    questions = Questions(QUESTIONS, ["1", "2", "3"], ["one", None, "two"])
    path = keep_finished(finished, questions, tmp_path / "traces.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "traces.partial.jsonl").open()]
    assert path == tmp_path / "traces.partial.jsonl" and str(path) in capsys.readouterr().err
    assert [line["question"] for line in lines] == QUESTIONS[:2]
    assert [line["answer"] for line in lines] == [finished[0].answer, finished[1].answer]
    assert (
        keep_finished({}, questions, path) is None
        and keep_finished(finished, questions, None) is None
    )
