"""Reasoning for as long as a rule has it, on an `LLM`; `vllm.score.eig.registry` has the names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

from vllm.score.eig.drivers.engine import EngineDriver
from vllm.score.eig.parameters import BOUNDS, RIVAL_BOUNDS, EIGParameters, check_values
from vllm.score.eig.problems import (
    Options,
    eig_problems,
    entropy_threshold_problems,
    fixed_budget_problems,
)
from vllm.score.eig.types import FAILURE, TIME, Trace
from vllm.score.eig.work import Steps
from vllm.score.engine.configuration import check_llm

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm_score.eig")


def expected_information_gain_reasoning(
    llm: LLM,
    questions: Sequence[Any],
    *,
    lambda_cost: float = 0.05,
    beam_size: int = 8,
    mc_samples: int = 5,
    sample_length: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.9,
    max_computation_time: float = 30.0,
    strict: bool = False,
    estimator: str = "entropy_difference",
    concurrency: int = 32,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = True,
    debug: bool = False,
    **options: Unpack[Options],
) -> list[Trace]:
    """Reason about questions as long as one more step is expected to tell more than it costs.

    Before each step the entropy H_t of the answer is computed, and what it is expected to be
    after the step, from continuations that the model writes. Reasoning goes on if and only if
    EIG_t = H_t - E[H_{t+1}] > lambda_cost. The derivation is in `vllm.score.eig.entropy`.

    Args:
        llm: a `vllm.LLM` on which nothing else is running.
        questions: each a text, token ids, or chat messages.
        lambda_cost: cost of a step, in nats; 0 to 10.
        beam_size: candidate answers; 1 to 20.
        mc_samples: continuations for a forecast; 1 to 20.
        sample_length: tokens of a step, and of a continuation; 1 to 512.
        temperature, top_p: the policy under which reasoning is written; 0.1 to 2, 0.1 to 1.
        max_computation_time: seconds for a decision, measured between the engine's steps; 1 to
            300. Questions that are decided side by side share the engine.
        strict: refuse values out of range instead of correcting them with a warning.
        estimator: "entropy_difference" (EIG_t as above) or "mutual_information".
        concurrency: questions side by side.
        lora_request: an adapter for all.
        use_tqdm: show a progress bar.
        debug: log each decision (logger "vllm_score.eig").
        options: see `vllm.score.eig.problems.Options`.

    Returns:
        A trace for each question, in order. A decision that failed or took too long is a stop,
        named in the trace and counted in the metrics.

    Raises:
        ScoreModeError: a question, parameter or option cannot be used; before anything runs.
    """
    check_llm(llm)
    parameters = EIGParameters.checked(
        strict,
        lambda_cost=lambda_cost,
        beam_size=beam_size,
        mc_samples=mc_samples,
        sample_length=sample_length,
        temperature=temperature,
        top_p=top_p,
        max_computation_time=max_computation_time,
    )
    problems = eig_problems(
        llm.get_tokenizer(),
        questions,
        parameters,
        estimator=estimator,
        max_model_len=llm.llm_engine.model_config.max_model_len,
        vocab_size=llm.llm_engine.model_config.get_vocab_size(),
        options=options,
    )
    return _told(run(llm, problems, concurrency, lora_request, use_tqdm, debug))


def entropy_threshold_reasoning(
    llm: LLM,
    questions: Sequence[Any],
    *,
    entropy_threshold: float = 0.5,
    strict: bool = False,
    concurrency: int = 32,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = True,
    debug: bool = False,
    **settings: Any,
) -> list[Trace]:
    """Reason as long as the entropy of the answer is above a threshold; no forecasts.

    Args:
        entropy_threshold: in nats; 0 to 10.
        settings: `beam_size`, `sample_length`, `temperature`, `top_p`, `max_computation_time` and
            the options, as in `expected_information_gain_reasoning`.

    Raises:
        ScoreModeError: as there.
    """
    check_llm(llm)
    threshold = _rival("entropy_threshold", entropy_threshold, strict)
    parameters, options = _settings(settings, strict)
    problems = entropy_threshold_problems(
        llm.get_tokenizer(),
        questions,
        parameters,
        threshold,
        max_model_len=llm.llm_engine.model_config.max_model_len,
        vocab_size=llm.llm_engine.model_config.get_vocab_size(),
        options=options,
    )
    return _told(run(llm, problems, concurrency, lora_request, use_tqdm, debug))


def fixed_budget_reasoning(
    llm: LLM,
    questions: Sequence[Any],
    *,
    fixed_budget: int = 256,
    strict: bool = False,
    concurrency: int = 32,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = True,
    debug: bool = False,
    **settings: Any,
) -> list[Trace]:
    """Reason for a number of tokens; where the model ends before, it is overruled.

    Args:
        fixed_budget: tokens of reasoning; `thinking_n_ignore=0` lets the model end before.
        settings: as in `entropy_threshold_reasoning`.

    Raises:
        ScoreModeError: as there.
    """
    check_llm(llm)
    budget = int(_rival("fixed_budget", fixed_budget, strict))
    parameters, options = _settings(settings, strict)
    problems = fixed_budget_problems(
        llm.get_tokenizer(),
        questions,
        parameters,
        budget,
        max_model_len=llm.llm_engine.model_config.max_model_len,
        vocab_size=llm.llm_engine.model_config.get_vocab_size(),
        options=options,
    )
    return _told(run(llm, problems, concurrency, lora_request, use_tqdm, debug))


def _rival(name: str, value: Any, strict: bool) -> float:
    return float(check_values({name: value}, RIVAL_BOUNDS, strict=strict)[name])


def _settings(settings: dict[str, Any], strict: bool) -> tuple[EIGParameters, Options]:
    """Parameters and options; names of neither are refused where the options are read."""
    given = {name: settings.pop(name) for name in BOUNDS if name in settings}
    return EIGParameters.checked(strict, **given), settings  # type: ignore[return-value]


def run(
    llm: LLM,
    problems: Sequence[Steps[Trace]],
    concurrency: int,
    lora_request: LoRARequest | None,
    use_tqdm: bool,
    debug: bool,
    finished: dict[int, Trace] | None = None,
) -> list[Trace]:
    """The values of the generators, in their order.

    Args:
        finished: filled as they finish, by their places: what a run that is interrupted has.
    """
    from tqdm import tqdm

    driver: EngineDriver = EngineDriver(llm, concurrency=concurrency, lora_request=lora_request)
    traces = {} if finished is None else finished
    bar = tqdm(total=len(problems), desc="Reasoning", unit="question", disable=not use_tqdm)
    with bar, _logging_decisions(debug):
        for index, trace in driver.run_all(problems):
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


def _told(traces: list[Trace]) -> list[Trace]:
    note = unanswered_note(traces)
    if note is not None:
        logger.warning("%s.", note)
    return traces


@contextmanager
def _logging_decisions(debug: bool) -> Iterator[None]:
    """Within it each decision is logged; on standard error where nobody has configured logging."""
    if not debug:
        yield
        return
    level = logger.level
    handler = None if logger.hasHandlers() else logging.StreamHandler()
    logger.setLevel(logging.DEBUG)
    if handler is not None:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        if handler is not None:
            logger.removeHandler(handler)
