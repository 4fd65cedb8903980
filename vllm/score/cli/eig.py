"""`vllm-score eig`: reason about questions for as long as a step tells more than it costs."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from vllm.platforms import current_platform
from vllm.score.armed import require_score_mode
from vllm.score.checks import Count, check, describe, limits_of
from vllm.score.cli.inputs import Questions, check_output, read_questions
from vllm.score.cli.model import Model
from vllm.score.eig.answers import normalise
from vllm.score.eig.candidates import candidate_source
from vllm.score.eig.engines import LLMReasoner
from vllm.score.eig.options import Options, parameters_of, unescape
from vllm.score.eig.plots import FORMATS, plot_traces
from vllm.score.eig.reasoning import (
    ANSWER_ROOM,
    MAX_TOKENS_THINKING,
    eig_problems,
    run,
    unanswered_note,
)
from vllm.score.eig.records import Trace
from vllm.score.eig.report import (
    EIGMetrics,
    metrics_tables,
    print_tables,
    run_table,
    summarize_run,
    write_traces,
)
from vllm.score.eig.rules import StoppingRule, all_rules, find_rule
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import flag, long_step, say, shows_bars
from vllm.score.tiny import additions
from vllm_score_command import options as shared

EMBEDDED_QUESTIONS = 32
# A step of two sums, each a token; the embedded model knows no words to be overruled by.
EMBEDDED = {
    "sample_length": 2,
    "max_tokens_thinking": 16,
    "thinking_n_ignore": 0,
    "answer_cue": additions.CUE,
    "answer_end": additions.END,
}
END_OF_SEQUENCE = "EOS"


def declare(parser: ArgumentParser) -> None:
    """The options of the command, with the parameters of rules that others have registered."""
    shared.eig(parser)
    rules = all_rules()
    group = parser.add_argument_group("Rules", ", ".join(rules))
    fields = {name: each for rule in rules.values() for name, each in rule.parameters().items()}
    for name, each in fields.items():
        if flag(name) not in parser._option_string_actions:
            text = f"{each.description}; {describe(each)} (default: {each.default})"
            group.add_argument(flag(name), metavar="VALUE", help=text.replace("%", "%%"))


def eig(options: Namespace, results: TextIO) -> None:
    """Reason about the questions that the options name, and print and write what was found."""
    require_score_mode()
    progress = not options.quiet
    model = Model(options)
    seed = int(options.engine.get("seed", 0))
    check("--concurrency", options.concurrency, Count)
    output = check_output("output", options.output, (".jsonl",), options.file)
    plot = check_output("plot", options.plot, FORMATS, options.file)
    questions = read_questions(options)
    given = {name: value for name, value in vars(options).items() if value is not None}
    if model.name is None:
        questions = questions or _additions(seed)
        given = {**EMBEDDED, **given}
        if "fixed_budget" in given and options.max_tokens_thinking is None:
            del given["max_tokens_thinking"]
    elif questions is None:
        raise ScoreModeError(
            "a model is named and no question; give --question TEXT or --file PATH"
        )
    metrics = EIGMetrics()
    rule = make_rule(given, questions.choices)
    asked = make_options({**given, "seed": seed, "metrics": metrics}, questions.choices)
    model.read(lambda: additions.additions_model(progress=progress).directory)
    prompts = questions.token_ids(model.tokenizer)
    most = rule.budget(asked.max_tokens_thinking)
    needed = MAX_TOKENS_THINKING if most is None else most
    length = max(map(len, prompts)) + needed + rule.sample_length + ANSWER_ROOM
    length = min(length, model.longest or length)
    problems = eig_problems(
        model.tokenizer, prompts, rule, max_model_len=length, options=asked, names=questions.names
    )
    # Contexts are shared in whole blocks: on a CPU vLLM's are too large for steps to be.
    blocks = {"block_size": 32} if current_platform.is_cpu() else {}
    llm = model.start(length, seed=seed, **blocks)

    finished: dict[int, Trace] = {}
    bars = shows_bars(progress)
    step = f"Reasoning about {len(problems)} question(s)"
    try:
        with long_step(step, "Reasoned", progress and not bars):
            reasoner = LLMReasoner(llm, concurrency=options.concurrency)
            traces = run(reasoner, problems, use_tqdm=bars, finished=finished)
    except BaseException:
        keep_finished(finished, questions, output)
        raise
    found = {"model": model.name, "scaler": options.scaler, "parameters": asdict(rule)}
    _report(found, questions, traces, metrics, results, as_json=options.json)
    if output is not None:
        write_traces(traces, output, questions=questions.texts, gold=questions.gold)
        say(f"wrote {output}", progress)
    if plot is not None:
        title = options.scaler.replace("_", " ")
        plot_traces(traces, plot, lambda_cost=rule.cost, title=title)
        say(f"wrote {plot}", progress)
    if note := unanswered_note(traces, "--max-computation-time", "--concurrency"):
        if all(trace.answer is None for trace in traces):
            raise ScoreModeError(note)
        say(f"Note: {note}", True)


def make_rule(given: Mapping[str, Any], choices: Sequence[Sequence[str]]) -> StoppingRule:
    """The rule that the options name, with its parameters.

    Args:
        given: options that are given, `scaler` and `strict` among them.
        choices: candidate answers of each question; empty where there are none.

    Raises:
        ScoreModeError: for options out of range or that do not go together.
    """
    name = given["scaler"]
    kind = find_rule(name)
    own, rest = kind.split(given)
    for key in {key for rule in all_rules().values() for key in rule.parameters()} & rest.keys():
        raise ScoreModeError(
            f"{flag(key)} is {rest[key]!r}, which {name} does not take; leave it out"
        )
    most = max(map(len, choices), default=0)
    limit = int(limits_of(kind.parameters()["beam_size"].rebuild_annotation())["le"])
    if choices:
        own.setdefault("beam_size", min(most, limit))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its record in the log is enough
        rule = kind.checked(given["strict"], **own)
    if most > rule.beam_size:
        raise ScoreModeError(
            f"a question has {most} choices, more than --beam-size {rule.beam_size} (at most "
            f"{limit}); raise it or give fewer"
        )
    return rule


def make_options(given: Mapping[str, Any], choices: Sequence[Sequence[str]]) -> Options:
    """The options beside the rule, of those that are given; texts with escapes.

    Raises:
        ScoreModeError: for options that cannot be used.
    """
    found = {name: given[name] for name in parameters_of(Options) if name in given}
    for name in ("answer_cue", "answer_end"):
        if name in found:
            found[name] = unescape(found[name])
    if found.get("answer_end") == END_OF_SEQUENCE:
        found["answer_end"] = None
    if not all(found.get("think_end", ())):
        raise ScoreModeError("--think-end is ''; give the text that ends the reasoning")
    if choices:
        if "candidates" in found:
            raise ScoreModeError(
                "--candidates and --choices-column each name candidates; give one of them"
            )
        found["candidates"] = [list(each) for each in choices]
    else:
        candidate_source(found.get("candidates", "beam"))
    return Options(**found)


def _additions(seed: int) -> Questions:
    problems = additions.random_problems(EMBEDDED_QUESTIONS, seed=abs(seed))
    return Questions(
        [each.question for each in problems],
        [f"addition {number}" for number in range(1, len(problems) + 1)],
        [each.answer for each in problems],
    )


def _report(
    found: dict[str, Any],
    questions: Questions,
    traces: Sequence[Trace],
    metrics: EIGMetrics,
    stream: TextIO,
    *,
    as_json: bool,
) -> None:
    summary = summarize_run(
        traces, questions.gold, equal=lambda found, right: normalise(found) == normalise(right)
    )
    if not as_json:
        console = Console(file=stream, highlight=False)
        print_tables(console, [run_table(summary), *metrics_tables(metrics.summary())])
        for line in questions.notes:
            console.print(line, markup=False)
        stream.flush()
        return
    found |= {
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


def keep_finished(
    finished: Mapping[int, Trace], questions: Questions, output: Path | None
) -> Path | None:
    """Write what an interrupted run has computed beside `output`; the file, if there is one."""
    if output is None or not finished:
        return None
    path = output.with_name(f"{output.stem}.partial.jsonl")
    order = sorted(finished)
    write_traces(
        [finished[i] for i in order],
        path,
        questions=[questions.texts[i] for i in order],
        gold=[questions.gold[i] for i in order],
    )
    say(f"interrupted: wrote the {len(order)} finished traces to {path}", True)
    return path
