"""`vllm-score eig`: reason about questions for as long as a step tells more than it costs."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from vllm.score.armed import require_score_mode
from vllm.score.checks import Count, check
from vllm.score.cli.common import check_output
from vllm.score.cli.eig_options import declare
from vllm.score.cli.eig_rule import Rule, make_rule
from vllm.score.cli.inputs import Questions, read_questions
from vllm.score.cli.model import Model
from vllm.score.eig.metrics import EIGMetrics
from vllm.score.eig.parameters import BOUNDS, RIVAL_BOUNDS
from vllm.score.eig.plots import FORMATS
from vllm.score.eig.scalers import run, unanswered_note
from vllm.score.eig.types import Trace
from vllm.score.errors import ScoreModeError
from vllm.score.launch.output import long_step, shows_bars
from vllm.score.tiny import additions_model

__all__ = ["declare", "eig", "keep_finished"]

EMBEDDED_QUESTIONS = 32
# A step of two sums, each a token; the embedded model knows no words to be overruled by.
EMBEDDED = {"sample_length": 2, "max_tokens_thinking": 16, "thinking_n_ignore": 0}
SETTINGS = (
    "candidates",
    "answer_cue",
    "answer_end",
    "length_normalization",
    "decide_at",
    "max_tokens_thinking",
    "thinking_n_ignore",
)


def eig(options: Namespace, results: TextIO) -> None:
    """Reason about the questions that the options name, and print and write what was found."""
    require_score_mode()
    progress = not options.quiet
    model = Model(options)
    seed = int(options.engine.get("seed", 0))
    check("--concurrency", options.concurrency, Count)
    output = check_output("output", options.output, (".jsonl",), options.file)
    plot = check_output("plot", options.plot, FORMATS, options.file)
    parameters = {name: getattr(options, name) for name in (*BOUNDS, *RIVAL_BOUNDS)}
    settings: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"think_end": options.think_end or None, "seed": seed}
    questions = read_questions(options)
    if model.name is None:
        _embedded_defaults(parameters, settings)
        questions = questions or _additions(seed)
    elif questions is None:
        raise ScoreModeError(
            "a model is named and no question; give --question TEXT or --file PATH"
        )
    rule = make_rule(
        options.scaler,
        parameters,
        strict=options.strict,
        estimator=options.estimator,
        options=settings,
        choices=questions.choices,
    )
    model.read(lambda: additions_model.additions_model(progress=progress).directory)
    metrics = EIGMetrics()
    rule.options["metrics"] = metrics
    prompts = questions.token_ids(model.tokenizer)
    length = max(map(len, prompts)) + rule.room
    length = min(length, model.longest or length)
    rule.check_choices(questions, model.tokenizer)
    problems = rule.problems(model.tokenizer, prompts, length)
    llm = model.start(length, seed=seed, **_block_size())

    finished: dict[int, Trace] = {}
    bars = shows_bars(progress)
    step = f"Reasoning about {len(problems)} question(s)"
    try:
        with long_step(step, "Reasoned", progress and not bars):
            traces = run(llm, problems, options.concurrency, None, bars, False, finished)
    except BaseException:
        keep_finished(finished, questions, output)
        raise
    assert model.name is not None
    _report(model.name, rule, questions, traces, metrics, results, as_json=options.json)
    _write_files(rule, questions, traces, output, plot, quiet=options.quiet)
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
