"""Reasoning, a step at a time, until a rule stops it: of one question, and of many on an `LLM`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from vllm.score.checks import check_list
from vllm.score.eig.candidates import CandidateSource, GivenCandidates, State, candidate_source
from vllm.score.eig.engines import LLMReasoner
from vllm.score.eig.options import Options
from vllm.score.eig.posterior import AnswerPosteriorEstimator, MonteCarloForecaster
from vllm.score.eig.records import (
    BUDGET,
    ENDED,
    FAILURE,
    TIME,
    AnswerPosterior,
    Continuation,
    Decision,
    Problem,
    Reasoner,
    Step,
    Trace,
)
from vllm.score.eig.rules import (
    DecisionPoint,
    EntropyThreshold,
    ExpectedInformationGain,
    FixedBudget,
    Meter,
    StoppingRule,
    decided,
    failed,
)
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import encode_inputs

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm_score.eig")

# Of the vocabulary, where nobody knows it.
NO_LIMIT = 1 << 31
# Tokens kept free behind the reasoning for the cue and an answer.
ANSWER_ROOM = 64
MAX_TOKENS_THINKING = 1024


def expected_information_gain_reasoning(
    llm: LLM, questions: Sequence[Any], *, strict: bool = False, **settings: Any
) -> list[Trace]:
    """Reason about questions as long as one more step is expected to tell more than it costs.

    Before each step the entropy H_t of the answer is computed, and what it is expected to be
    after the step, from continuations that the model writes. Reasoning goes on if and only if
    EIG_t = H_t - E[H_{t+1}] > lambda_cost. The derivation is in `vllm.score.eig.posterior`.

    Args:
        llm: a `vllm.LLM` on which nothing else is running.
        questions: each a text, token ids, or chat messages.
        strict: refuse values out of range instead of correcting them with a warning.
        settings: parameters of the rule, `vllm.score.eig.rules.ExpectedInformationGain`
            (`lambda_cost`, 0.05 nats; `beam_size`, 8; `mc_samples`, 5; `sample_length`, 64 tokens;
            `temperature`, 1; `top_p`, 0.9; `max_computation_time`, 30 seconds; `estimator`), and
            what `reason` takes.

    Returns:
        A trace for each question, in order. A decision that failed or took too long is a stop,
        named in the trace and counted in the metrics.

    Raises:
        ScoreModeError: a question, parameter or option cannot be used; before anything runs.
    """
    own, options = ExpectedInformationGain.split(settings)
    rule = ExpectedInformationGain.checked(strict, **own)
    return reason(llm, questions, rule=rule, **options)


def entropy_threshold_reasoning(
    llm: LLM, questions: Sequence[Any], *, strict: bool = False, **settings: Any
) -> list[Trace]:
    """Reason as long as the entropy of the answer is above `entropy_threshold` (0.5 nats).

    See `expected_information_gain_reasoning`, and `vllm.score.eig.rules.EntropyThreshold`.
    """
    own, options = EntropyThreshold.split(settings)
    return reason(llm, questions, rule=EntropyThreshold.checked(strict, **own), **options)


def fixed_budget_reasoning(
    llm: LLM, questions: Sequence[Any], *, strict: bool = False, **settings: Any
) -> list[Trace]:
    """Reason for `fixed_budget` tokens (256); where the model ends before, it is overruled.

    `thinking_n_ignore=0` lets it end before. See `expected_information_gain_reasoning`, and
    `vllm.score.eig.rules.FixedBudget`.
    """
    own, options = FixedBudget.split(settings)
    return reason(llm, questions, rule=FixedBudget.checked(strict, **own), **options)


def reason(
    llm: LLM,
    questions: Sequence[Any],
    *,
    rule: StoppingRule,
    concurrency: int = 32,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = True,
    debug: bool = False,
    **options: Any,
) -> list[Trace]:
    """Reason about questions under a rule. Works also where an event loop runs.

    Args:
        llm: a `vllm.LLM` on which nothing else is running.
        questions: each a text, token ids, or chat messages.
        rule: when to stop, e.g. `ExpectedInformationGain(lambda_cost=0.03)`. Its time limit is
            looked at between the engine's steps, which questions side by side share.
        concurrency: questions side by side.
        lora_request: an adapter for all.
        use_tqdm: show a progress bar.
        debug: log each decision (logger "vllm_score.eig").
        options: see `vllm.score.eig.options.Options`.

    Returns:
        A trace for each question, in order.

    Raises:
        ScoreModeError: a question or an option cannot be used; before anything runs.
    """
    check_llm(llm)
    model = llm.llm_engine.model_config
    problems = eig_problems(
        llm.get_tokenizer(),
        questions,
        rule,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        options=options,
    )
    reasoner = LLMReasoner(llm, concurrency=concurrency, lora_request=lora_request)
    with _logging_decisions() if debug else nullcontext():
        traces = run(reasoner, problems, use_tqdm=use_tqdm)
    if note := unanswered_note(traces):
        logger.warning("%s.", note)
    return traces


def run(
    reasoner: LLMReasoner,
    problems: Sequence[Problem[Trace]],
    *,
    use_tqdm: bool,
    finished: dict[int, Trace] | None = None,
) -> list[Trace]:
    """The values of the problems, in their order.

    Args:
        finished: filled as they finish, by their places: what a run that is interrupted has.
    """
    traces = {} if finished is None else finished
    bar = tqdm(total=len(problems), desc="Reasoning", unit="question", disable=not use_tqdm)
    with bar:
        for index, trace in reasoner.run_all(problems):
            traces[index] = trace
            bar.update()
    return [traces[i] for i in range(len(problems))]


def unanswered_note(
    traces: Sequence[Trace],
    time_option: str = "max_computation_time",
    concurrency_option: str = "concurrency",
) -> str | None:
    """What time limits and failures did to a run, in a sentence; None if they did nothing.

    Args:
        time_option, concurrency_option: how the caller's users spell them.
    """
    last = [trace.steps[-1].decision for trace in traces]
    late = sum(decision.reason == TIME for decision in last)
    failures = [d.failure for d in last if d.reason == FAILURE and d.failure is not None]
    unanswered = sum(trace.answer is None for trace in traces)
    if not late and not failures:
        return None
    parts = [f"{unanswered} of {len(traces)} questions have no answer"]
    if late:
        parts.append(
            f"{late} stopped at the time limit of a decision (raise {time_option}, or lower "
            f"{concurrency_option}: questions that are decided side by side share the engine)"
        )
    if failures:
        parts.append(f"{len(failures)} failed, the first with {': '.join(failures[0])!r}")
    return "; ".join(parts)


def eig_problems(
    tokenizer: Any,
    questions: Sequence[Any],
    rule: StoppingRule,
    *,
    max_model_len: int | None = None,
    vocab_size: int | None = None,
    options: Options | Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> list[Problem[Trace]]:
    """The reasoning about each question, ready for the `run_all` of a reasoner.

    Args:
        tokenizer: the model's.
        questions: each a text, token ids, or chat messages.
        rule: when to stop.
        max_model_len: the engine's; bounds the tokens of reasoning.
        vocab_size: the model's; token ids are checked against it.
        options: `Options`, or theirs by name.
        names: what errors call the questions; by default questions[i].

    Raises:
        ScoreModeError: a question or an option cannot be used.
    """
    options = options if isinstance(options, Options) else Options(**(options or {}))
    check_list("questions", questions)
    names = [f"questions[{i}]" for i in range(len(questions))] if names is None else names
    found = encode_inputs(tokenizer, questions, names, vocab_size or NO_LIMIT)
    most = rule.budget(options.max_tokens_thinking)
    most = MAX_TOKENS_THINKING if most is None else most
    sources = _sources(options, names, rule.beam_size, tokenizer)
    problems: list[Problem[Trace]] = []
    for i, ((prompt, _), source) in enumerate(zip(found, sources, strict=True)):
        room = _room(most, len(prompt), rule.sample_length, max_model_len, names[i])
        estimator = AnswerPosteriorEstimator(
            source,
            tokenizer,
            beam_size=rule.beam_size,
            answer_format=options.answer_format,
            length_normalization=options.length_normalization,
        )
        forecaster = MonteCarloForecaster(
            estimator,
            sample_length=rule.sample_length,
            temperature=rule.temperature,
            top_p=rule.top_p,
            stop=options.think_end,
        )
        bounded = replace(options, max_tokens_thinking=room)
        begin = partial(_Reasoning, prompt, rule, forecaster, bounded, i)
        problems.append(partial(_reason_about, begin))
    return problems


def _room(most: int, length: int, step: int, max_model_len: int | None, name: str) -> int:
    """Tokens of reasoning behind a question of `length` tokens, `most` at most."""
    if not length:
        raise ScoreModeError(f"{name} has no tokens; give at least one.")
    if max_model_len is None:
        return most
    room = max_model_len - length - step - ANSWER_ROOM
    if room < 0:
        raise ScoreModeError(
            f"{name} has {length} tokens; max_model_len={max_model_len} leaves no room for a step "
            f"of {step} tokens and an answer: shorten it, lower sample_length, or raise "
            "max_model_len."
        )
    if room < most:
        logger.info(
            "%s: max_tokens_thinking is %d instead of %d, for which max_model_len=%d has no room.",
            name,
            room,
            most,
            max_model_len,
        )
    return min(room, most)


def _sources(
    options: Options, names: Sequence[str], beam_size: int, tokenizer: Any
) -> list[CandidateSource]:
    """One source for each question; answers that are given can be scored by every decision."""
    given = options.candidates
    listed = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    single = not listed or isinstance(given[0], str)
    if not single and len(given) != len(names):
        raise ScoreModeError(
            f"candidates has {len(given)} lists for {len(names)} questions; give one for each."
        )
    sources = [candidate_source(each) for each in ([given] if single else given)]
    for name, source in zip(names, sources, strict=False):
        if isinstance(source, GivenCandidates):
            try:
                source.check_count(beam_size)
                options.answer_format.encode(tokenizer, source.answers)
            except ScoreModeError as error:
                raise ScoreModeError(f"candidates of {name}: {error}") from error
    return sources * len(names) if single else sources


def _logging_decisions() -> ExitStack:
    """Each decision is logged until it is closed; on standard error where nobody has configured
    logging."""
    undo = ExitStack()
    undo.callback(logger.setLevel, logger.level)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        undo.callback(logger.removeHandler, handler)
    logger.setLevel(logging.DEBUG)
    return undo


async def _reason_about(begin: Callable[[Reasoner], _Reasoning], reasoner: Reasoner) -> Trace:
    return await begin(reasoner).run()


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


@dataclass
class _Reasoning:
    """The reasoning about a question, the `index`-th of a run, so far."""

    prompt: list[int]
    rule: StoppingRule
    forecaster: MonteCarloForecaster
    options: Options
    index: int
    reasoner: Reasoner
    reasoning: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ended: bool = False
    overruled: int = 0
    tokens_sampled: int = 0
    posterior: AnswerPosterior | None = None  # the last one that was had

    def __post_init__(self) -> None:
        self.random = np.random.default_rng([self.options.seed, self.index])

    async def run(self) -> Trace:
        """Reason; ends after `max_tokens_thinking` at the latest.

        A step that a decision has forecast is one of the forecasts, drawn uniformly: they are
        draws of what would be written next, and computed already. A failure is the trace's last
        step.
        """
        try:
            while True:
                if self.options.decide_at == "end" and not self.ended and self.left > 0:
                    self.add([], await self.write([], self.left))
                decision = await self.decide()
                logger.debug("%d tokens of reasoning: %s", len(self.reasoning), describe(decision))
                if not decision.go_on:
                    break
                await self.step(decision)
        except Exception as error:  # of deciding it is a decision already
            decision = failed(error, "writing")
            self.options.metrics.record(decision)
        steps = [*self.steps, Step(len(self.reasoning), decision)]
        return Trace(
            prompt_token_ids=self.prompt,
            reasoning_token_ids=self.reasoning,
            reasoning=self.tokenizer.decode(self.reasoning),
            ended=self.ended,
            steps=steps,
            answer=None if self.posterior is None else self.posterior.best,
            tokens_sampled=self.tokens_sampled
            + sum(step.decision.tokens_sampled for step in steps),
        )

    @property
    def tokenizer(self) -> Any:
        return self.forecaster.estimator.tokenizer

    @property
    def left(self) -> int:
        """Tokens of reasoning that are left."""
        return (self.options.max_tokens_thinking or 0) - len(self.reasoning)

    @property
    def bridge(self) -> list[int]:
        """What would come before the next step: its gain, which chooses it, is not known yet."""
        return self._encode(self.options.prompts.neutral) if self.ended else []

    async def decide(self) -> Decision:
        """The rule's decision; a stop where no step can follow."""
        ignored = self.ended and self.overruled >= self.options.thinking_n_ignore
        final = self.left <= 0 or ignored
        point = DecisionPoint(
            Meter(self.reasoner, self.rule.max_computation_time),
            self.forecaster,
            State([*self.prompt, *self.reasoning], self.tokenizer.decode(self.reasoning)),
            known=[] if self.posterior is None else self.posterior.answers,
            bridge=self.bridge,
            position=len(self.reasoning),
        )
        decision = await decided(point, None if final else self.rule.decide)
        if final and decision.failure is None:
            decision = replace(decision, reason=ENDED if ignored else BUDGET)
        self.posterior = decision.posterior or self.posterior
        self.options.metrics.record(decision)
        return decision

    async def step(self, decision: Decision) -> None:
        """Take a step that was decided."""
        position, text = len(self.reasoning), ""
        if self.ended:
            prompts, estimate = self.options.prompts, decision.estimate
            text = prompts.neutral
            if estimate is not None:
                text = prompts.choose(estimate.gain, self.rule.cost or 0.0)
            self.overruled += 1
        inserted = self._encode(text)[: self.left]
        forecast = decision.forecast
        # A forecast is a draw of the next step only behind the same tokens.
        if forecast is not None and inserted == self.bridge[: self.left]:
            drawn = forecast.continuations[self.random.integers(len(forecast.continuations))]
        else:
            drawn = await self.write(inserted, self.forecaster.sample_length)
        added = self.add(inserted, drawn)
        self.steps.append(
            Step(position, decision, text, self.tokenizer.decode(added), len(inserted + added))
        )

    async def write(self, inserted: list[int], max_tokens: int) -> Continuation:
        """One continuation of `max_tokens` at most."""
        length = min(max_tokens, self.left - len(inserted))
        if length < 1:
            return Continuation([], "", False)
        context = [*self.prompt, *self.reasoning, *inserted]
        meter = Meter(self.reasoner)
        (drawn,) = await self.forecaster.draw(meter, context, 1, length)
        self.tokens_sampled += meter.tokens_sampled
        return drawn

    def add(self, inserted: list[int], drawn: Continuation) -> list[int]:
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
