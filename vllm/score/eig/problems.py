"""Questions and settings, made into generators that a driver runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates import CandidateSource, GivenCandidates, candidate_source
from vllm.score.eig.core import (
    AnswerPosteriorEstimator,
    ExpectedInformationGainCalculator,
    MonteCarloForecaster,
)
from vllm.score.eig.metrics import METRICS, EIGMetrics
from vllm.score.eig.parameters import EIGParameters
from vllm.score.eig.prompts import ContinuationPrompts
from vllm.score.eig.reasoning import ReasoningOptions, reason
from vllm.score.eig.rules import EntropyThreshold, FixedBudget, StoppingRule
from vllm.score.eig.types import Trace
from vllm.score.eig.work import Steps
from vllm.score.engine.request import read_token_ids
from vllm.score.errors import ScoreModeError
from vllm.score.sequence.contexts import context_token_ids

logger = logging.getLogger("vllm_score.eig")

# Of the vocabulary, where nobody knows it.
NO_LIMIT = 1 << 31
# Tokens kept free behind the reasoning for the cue and an answer.
ANSWER_ROOM = 64

MakeRule = Callable[[AnswerPosteriorEstimator, MonteCarloForecaster], StoppingRule]


class Options(TypedDict, total=False):
    """What every scaler takes beside its parameters.

    Attributes:
        candidates: "beam" (default), "sampled", "numeric", "boxed"; a `CandidateSource`; a list of
            answers for all questions, or one list for each.
        answer_cue, answer_end: what comes before and after an answer; see `AnswerFormat`.
        length_normalization: "none" (default), "tokens" or "bytes".
        decide_at: "step" (default): before every `sample_length` tokens; or "end": only where the
            model ends its reasoning by itself.
        max_tokens_thinking: tokens of reasoning at most (default 1024, or what there is room for).
        thinking_n_ignore: how often the model is overruled when it ends its reasoning (default 4).
        think_end: texts that end the reasoning, as "</think>".
        prompts: what is inserted where the model is overruled.
        seed: of the choice among forecasts.
        metrics: count the decisions; by default those of `get_eig_metrics_summary`.
    """

    candidates: Any
    answer_cue: str
    answer_end: str | None
    length_normalization: str
    decide_at: str
    max_tokens_thinking: int
    thinking_n_ignore: int
    think_end: Sequence[str]
    prompts: ContinuationPrompts
    seed: int
    metrics: EIGMetrics


def eig_problems(
    tokenizer: Any,
    questions: Sequence[Any],
    parameters: EIGParameters,
    *,
    estimator: str = "entropy_difference",
    max_model_len: int | None = None,
    vocab_size: int | None = None,
    options: Options | None = None,
) -> list[Steps[Trace]]:
    """Expected information gain reasoning about each question, ready for a driver.

    Args:
        tokenizer: the model's.
        questions: each a text, token ids, or chat messages.
        parameters: checked.
        estimator: of the gain, see `vllm.score.eig.entropy`.
        max_model_len: the engine's; bounds `max_tokens_thinking`.
        vocab_size: the model's; token ids are checked against it.
        options: see `Options`.

    Raises:
        ScoreModeError: a question or an option cannot be used.
    """

    def rule(_: AnswerPosteriorEstimator, forecaster: MonteCarloForecaster) -> StoppingRule:
        return ExpectedInformationGainCalculator(
            forecaster,
            lambda_cost=parameters.lambda_cost,
            estimator=estimator,
            max_computation_time=parameters.max_computation_time,
        )

    return make_problems(
        tokenizer, questions, parameters, rule, max_model_len, options or {}, vocab_size
    )


def entropy_threshold_problems(
    tokenizer: Any,
    questions: Sequence[Any],
    parameters: EIGParameters,
    threshold: float,
    *,
    max_model_len: int | None = None,
    vocab_size: int | None = None,
    options: Options | None = None,
) -> list[Steps[Trace]]:
    """As `eig_problems`, but reasoning goes on as long as H_t is above `threshold` nats."""

    def rule(estimator: AnswerPosteriorEstimator, _: MonteCarloForecaster) -> StoppingRule:
        return EntropyThreshold(estimator, threshold, parameters.max_computation_time)

    return make_problems(
        tokenizer, questions, parameters, rule, max_model_len, options or {}, vocab_size
    )


def fixed_budget_problems(
    tokenizer: Any,
    questions: Sequence[Any],
    parameters: EIGParameters,
    budget: int,
    *,
    max_model_len: int | None = None,
    vocab_size: int | None = None,
    options: Options | None = None,
) -> list[Steps[Trace]]:
    """As `eig_problems`, but reasoning goes on for `budget` tokens."""

    def rule(estimator: AnswerPosteriorEstimator, _: MonteCarloForecaster) -> StoppingRule:
        return FixedBudget(estimator, parameters.max_computation_time)

    bounded: Options = {**(options or {}), "max_tokens_thinking": budget}
    return make_problems(tokenizer, questions, parameters, rule, max_model_len, bounded, vocab_size)


def make_problems(
    tokenizer: Any,
    questions: Sequence[Any],
    parameters: EIGParameters,
    rule: MakeRule,
    max_model_len: int | None,
    options: Options,
    vocab_size: int | None = None,
) -> list[Steps[Trace]]:
    """A generator for each question, under a rule.

    Raises:
        ScoreModeError: a question or an option cannot be used.
    """
    if isinstance(questions, str) or not isinstance(questions, Sequence):
        raise ScoreModeError(
            f"questions must be a list, got one {type(questions).__name__}; write [question]."
        )
    seed, metrics = options.get("seed", 0), options.get("metrics", METRICS)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ScoreModeError(f"seed is {seed!r}; it must be a whole number from 0 on.")
    if not isinstance(metrics, EIGMetrics):
        raise ScoreModeError(f"metrics is {metrics!r}; give an EIGMetrics, or leave it out.")
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise ScoreModeError(
            f"options has {', '.join(sorted(unknown))}; there are "
            f"{', '.join(Options.__annotations__)}."
        )
    reasoning = _reasoning_options(parameters, options)
    size = NO_LIMIT if vocab_size is None else vocab_size
    prompts = [_token_ids(q, tokenizer, f"questions[{i}]", size) for i, q in enumerate(questions)]
    bounds = [
        _bounded(reasoning, len(p), parameters, max_model_len, i) for i, p in enumerate(prompts)
    ]
    sources = _sources(options.get("candidates", "beam"), len(prompts))
    form = _answer_format(options)
    _check_given(sources, parameters.beam_size, form, tokenizer)
    problems = []
    for i, (prompt, bound, source) in enumerate(zip(prompts, bounds, sources, strict=True)):
        estimator = AnswerPosteriorEstimator(
            source,
            tokenizer,
            beam_size=parameters.beam_size,
            answer_format=form,
            length_normalization=options.get("length_normalization", "none"),
        )
        forecaster = MonteCarloForecaster(
            estimator,
            mc_samples=parameters.mc_samples,
            sample_length=parameters.sample_length,
            temperature=parameters.temperature,
            top_p=parameters.top_p,
            stop=_stop_texts(options.get("think_end", ())),
        )
        problems.append(
            reason(
                prompt,
                rule(estimator, forecaster),
                forecaster,
                bound,
                seed=(seed, i),
                metrics=metrics,
            )
        )
    return problems


def _reasoning_options(parameters: EIGParameters, options: Options) -> ReasoningOptions:
    names = ("max_tokens_thinking", "decide_at", "thinking_n_ignore", "prompts")
    given = {name: options[name] for name in names if name in options}  # type: ignore[literal-required]
    return ReasoningOptions(lambda_cost=parameters.lambda_cost, **given)


def _bounded(
    reasoning: ReasoningOptions,
    length: int,
    parameters: EIGParameters,
    max_model_len: int | None,
    index: int,
) -> ReasoningOptions:
    """The options with no more reasoning than the model has room for."""
    if max_model_len is None:
        return reasoning
    room = max_model_len - length - parameters.sample_length - ANSWER_ROOM
    if room < 0:
        raise ScoreModeError(
            f"questions[{index}] has {length} tokens; max_model_len={max_model_len} leaves no room "
            f"for a step of {parameters.sample_length} tokens and an answer: shorten it, lower "
            "sample_length, or raise max_model_len."
        )
    if room < reasoning.max_tokens_thinking:
        logger.info(
            "questions[%d]: max_tokens_thinking is %d instead of %d, for which max_model_len=%d "
            "has no room.",
            index,
            room,
            reasoning.max_tokens_thinking,
            max_model_len,
        )
        return replace(reasoning, max_tokens_thinking=room)
    return reasoning


def _token_ids(question: Any, tokenizer: Any, name: str, vocab_size: int) -> list[int]:
    """Token ids as given; a text with the tokenizer's special tokens; messages by the template."""
    question = question.tolist() if hasattr(question, "tolist") else question
    tokens = isinstance(question, Sequence) and not isinstance(question, (str, bytes, bytearray))
    if tokens and question and not isinstance(question[0], Mapping):
        return read_token_ids(question, vocab_size, name).tolist()
    ids = context_token_ids(question, tokenizer, name)
    if not ids:
        raise ScoreModeError(f"{name} has no tokens; give at least one.")
    return ids


def _sources(given: Any, count: int) -> list[CandidateSource]:
    """One source for each question."""
    lists = isinstance(given, Sequence) and not isinstance(given, str) and len(given)
    if lists and not isinstance(given[0], str):
        if len(given) != count:
            raise ScoreModeError(
                f"candidates has {len(given)} lists for {count} questions; give one for each."
            )
        return [candidate_source(each) for each in given]
    source = candidate_source(given)
    return [source] * count


def _check_given(
    sources: Sequence[CandidateSource], beam_size: int, form: AnswerFormat, tokenizer: Any
) -> None:
    """Refuse given answers that no decision could score, before the first one."""
    checked = set()
    for i, source in enumerate(sources):
        if not isinstance(source, GivenCandidates) or id(source) in checked:
            continue
        checked.add(id(source))
        try:
            source.check_count(beam_size)
            form.encode(tokenizer, source.answers)
        except ScoreModeError as error:
            raise ScoreModeError(f"candidates of questions[{i}]: {error}") from error


def _answer_format(options: Options) -> AnswerFormat:
    named = {"answer_cue": "cue", "answer_end": "end"}
    return AnswerFormat(**{named[k]: options[k] for k in named if k in options})  # type: ignore[literal-required]


def _stop_texts(given: str | Sequence[str]) -> Sequence[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ScoreModeError(f"think_end is {given!r}; give a text or a list of texts.")
    return list(texts)
