"""`vllm-score eig`: reason about questions for as long as a step tells more than it costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vllm.score.cli import eig_options as own
from vllm.score.cli import options

if TYPE_CHECKING:
    from vllm.score.cli.eig_rule import Rule
    from vllm.score.cli.questions import Questions
    from vllm.score.eig.metrics import EIGMetrics
    from vllm.score.eig.types import Trace

EMBEDDED_QUESTIONS = 32
# A step of two sums, each a token; the embedded model knows no words to be overruled by.
EMBEDDED = {"sample_length": 2, "max_tokens_thinking": 16, "thinking_n_ignore": 0}
# Tokens of a question where the tokenizer cannot be read without the engine.
_UNKNOWN_LENGTH = 2048


def eig(
    model: options.ModelArgument = None,
    model_option: options.Model = None,
    question: own.Question = None,
    file: own.File = None,
    question_column: own.QuestionColumn = None,
    answer_column: own.AnswerColumn = None,
    skip_empty: own.SkipEmpty = False,
    chat: own.Chat = False,
    scaler: own.ScalerName = "expected_information_gain_reasoning",
    lambda_cost: own.LambdaCost = None,
    beam_size: own.BeamSize = None,
    mc_samples: own.McSamples = None,
    sample_length: own.SampleLength = None,
    temperature: own.Temperature = None,
    top_p: own.TopP = None,
    max_computation_time: own.MaxComputationTime = None,
    entropy_threshold: own.EntropyThreshold = None,
    fixed_budget: own.FixedBudget = None,
    strict: own.Strict = False,
    estimator: own.Estimator = None,
    decide_at: own.DecideAt = "step",
    candidates: own.Candidates = None,
    choices_column: own.ChoicesColumn = None,
    answer_cue: own.AnswerCue = None,
    answer_end: own.AnswerEnd = None,
    length_normalization: own.LengthNormalization = "none",
    max_tokens_thinking: own.MaxTokensThinking = None,
    thinking_n_ignore: own.ThinkingNIgnore = None,
    think_end: own.ThinkEnd = None,
    concurrency: own.Concurrency = 32,
    seed: own.Seed = 0,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    enforce_eager: options.EnforceEager = False,
    low_memory: options.LowMemory = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.Json = False,
    output: own.Output = None,
    plot: own.Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Let a model reason about questions as long as one more step is expected to tell more
    about the answer than it costs.

    Without arguments: a small model made on this machine, on additions that it has learned.

    With a model:  vllm-score eig MODEL --file questions.jsonl --output traces.jsonl
    --plot traces.html
    """
    from vllm.score.armed import require_score_mode
    from vllm.score.cli import checks
    from vllm.score.cli.eig_rule import make_rule
    from vllm.score.cli.engine import open_llm, quieten
    from vllm.score.cli.hub import load_tokenizer, longest_context, model_config
    from vllm.score.cli.questions import QuestionOptions
    from vllm.score.cli.streams import results_stream
    from vllm.score.eig.metrics import EIGMetrics
    from vllm.score.eig.plots import FORMATS
    from vllm.score.launch.steps import long_step, shows_bars

    model = checks.one_model(model, model_option)
    checks.check_positive(
        concurrency=concurrency,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    checks.check_engine(dtype, gpu_memory_utilization)
    if model is None:
        checks.check_no_model(quantization=quantization, tokenizer=tokenizer, revision=revision)
    inputs = [str(each) for each in file or []]
    checks.check_output("--output", output, (".jsonl",), inputs)
    checks.check_output("--plot", plot, FORMATS, inputs)
    given = QuestionOptions(
        question or [],
        file or [],
        question_column,
        answer_column,
        choices_column,
        chat,
        skip_empty,
    )
    parameters: dict[str, Any] = {
        "lambda_cost": lambda_cost,
        "beam_size": beam_size,
        "mc_samples": mc_samples,
        "sample_length": sample_length,
        "temperature": temperature,
        "top_p": top_p,
        "max_computation_time": max_computation_time,
        "entropy_threshold": entropy_threshold,
        "fixed_budget": fixed_budget,
    }
    settings: dict[str, Any] = {
        "candidates": candidates,
        "answer_cue": answer_cue,
        "answer_end": answer_end,
        "length_normalization": length_normalization,
        "decide_at": decide_at,
        "max_tokens_thinking": max_tokens_thinking,
        "thinking_n_ignore": thinking_n_ignore,
        "think_end": think_end or None,
        "seed": seed,
    }
    if model is None:
        _embedded_defaults(parameters, settings)
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}

    with results_stream() as results:
        quieten()
        require_score_mode()
        questions = _additions(seed) if model is None and not given.given else given.read()
        rule = make_rule(
            scaler,
            parameters,
            strict=strict,
            estimator=estimator,
            options=settings,
            choices=questions.choices,
        )
        if model is None:
            from vllm.score.tiny.additions_model import additions_model

            model = str(additions_model(progress=not quiet).directory)
            # vLLM's "auto" would round its float32 weights to bfloat16.
            dtype = "float32" if dtype == "auto" else dtype
        longest = longest_context(model_config(model, **loading))
        if tokenizer is None:
            loaded = load_tokenizer(model, **loading)
        else:  # the revision is the model's
            loaded = load_tokenizer(tokenizer, **{**loading, "revision": None})
        metrics = EIGMetrics()
        rule.options["metrics"] = metrics
        length = _UNKNOWN_LENGTH + rule.room
        if loaded is not None:
            prompts = questions.token_ids(loaded)
            length = max(map(len, prompts)) + rule.room
        length = min(length, longest or length)
        if loaded is not None:
            rule.check_choices(questions, loaded)
            problems = rule.problems(loaded, prompts, length)
        llm = open_llm(
            model,
            context_length=length,
            dtype=dtype,
            quantization=quantization,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager or None,
            low_memory=low_memory,
            tokenizer=tokenizer,
            progress=not quiet,
            seed=seed,
            **_block_size(),
            **loading,
        )
        if loaded is None:
            loaded = llm.get_tokenizer()
            rule.check_choices(questions, loaded)
            problems = rule.problems(loaded, questions.token_ids(loaded), length)

        from vllm.score.eig.scalers import run, unanswered_note
        from vllm.score.errors import ScoreModeError

        finished: dict[int, Trace] = {}
        bars = shows_bars(not quiet)
        step = f"Reasoning about {len(problems)} question(s)"
        try:
            with long_step(step, "Reasoned", not quiet and not bars):
                traces = run(llm, problems, concurrency, None, bars, False, finished)
        except BaseException:
            keep_finished(finished, questions, output)
            raise
        _report(model, rule, questions, traces, metrics, results, as_json=as_json)
        _write_files(rule, questions, traces, output, plot, quiet=quiet)
        note = unanswered_note(traces, "--max-computation-time", "--concurrency")
        if note is not None:
            if all(trace.answer is None for trace in traces):
                raise ScoreModeError(note)
            print(f"Note: {note}", file=sys.stderr)


def _embedded_defaults(parameters: dict[str, Any], settings: dict[str, Any]) -> None:
    from vllm.score.tiny.additions import CUE, END

    for name, value in {**EMBEDDED, "answer_cue": CUE, "answer_end": END}.items():
        target = parameters if name in parameters else settings
        if target[name] is None:
            target[name] = value


def _additions(seed: int) -> Questions:
    from vllm.score.cli.questions import Questions
    from vllm.score.tiny.additions import random_problems

    problems = random_problems(EMBEDDED_QUESTIONS, seed=abs(seed))
    return Questions(
        [each.question for each in problems],
        [f"addition {number}" for number in range(1, len(problems) + 1)],
        [each.answer for each in problems],
    )


def _block_size() -> dict[str, Any]:
    """Contexts are shared in whole blocks: on a CPU vLLM's are too large for steps to be."""
    from vllm.platforms import current_platform

    return {"block_size": 32} if current_platform.is_cpu() else {}


def _report(
    model: str,
    rule: Rule,
    questions: Questions,
    traces: Sequence[Trace],
    metrics: EIGMetrics,
    stream: TextIO,
    *,
    as_json: bool,
) -> None:
    from vllm.score.eig.candidates.extract import normalise
    from vllm.score.eig.metrics import metrics_tables
    from vllm.score.eig.table import run_table, summarize_run

    summary = summarize_run(
        traces, questions.gold, equal=lambda found, right: normalise(found) == normalise(right)
    )
    if as_json:
        found = {
            "model": model,
            "scaler": rule.name,
            "parameters": dict(rule.values),
            "notes": list(questions.notes),
            "summary": asdict(summary),
            "metrics": metrics.summary(),
            "questions": [
                {
                    "question": text,
                    "gold": gold,
                    "answer": trace.answer,
                    "reasoning_tokens": len(trace.reasoning_token_ids),
                    "tokens_sampled": trace.tokens_sampled,
                    "decisions": len(trace.steps),
                    "stopped": trace.steps[-1].decision.reason,
                }
                for text, gold, trace in zip(questions.texts, questions.gold, traces, strict=True)
            ],
        }
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        print(text, file=stream, flush=True)
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    for number, table in enumerate((run_table(summary), *metrics_tables(metrics.summary()))):
        if number:
            console.print()
        console.print(table)
    for line in questions.notes:
        console.print(line, markup=False)
    stream.flush()


def keep_finished(
    finished: Mapping[int, Trace], questions: Questions, output: Path | None
) -> Path | None:
    """Write what an interrupted run has computed beside `output`; the file, if there is one."""
    if output is None or not finished:
        return None
    from vllm.score.eig.traces_file import write_traces

    path = output.with_name(f"{output.stem}.partial.jsonl")
    order = sorted(finished)
    write_traces(
        [finished[i] for i in order],
        path,
        questions=[questions.texts[i] for i in order],
        gold=[questions.gold[i] for i in order],
    )
    print(f"interrupted: wrote the {len(order)} finished traces to {path}", file=sys.stderr)
    return path


def _write_files(
    rule: Rule,
    questions: Questions,
    traces: Sequence[Trace],
    output: Path | None,
    plot: Path | None,
    *,
    quiet: bool,
) -> None:
    if output is not None:
        from vllm.score.eig.traces_file import write_traces

        write_traces(traces, output, questions=questions.texts, gold=questions.gold)
    if plot is not None:
        from vllm.score.eig.plots import plot_traces

        plot_traces(traces, plot, lambda_cost=rule.lambda_cost, title=rule.name.replace("_", " "))
    for path in (output, plot):
        if path is not None and not quiet:
            print(f"wrote {path}", file=sys.stderr)
