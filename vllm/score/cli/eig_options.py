"""The options of `vllm-score eig`: their names, and what they say of themselves."""

from __future__ import annotations

from argparse import ArgumentParser

from vllm.score.eig.parameters import BOUNDS, RIVAL_BOUNDS
from vllm_score_command import options


def declare(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.description = """\
Let a model reason about questions as long as one more step is expected to tell more about the
answer than it costs.

  vllm-score eig                             additions, by a small model made on this machine
  vllm-score eig MODEL --file questions.jsonl --output traces.jsonl --plot traces.html"""
    options.add_model(parser)
    questions = parser.add_argument_group("Questions")
    questions.add_argument(
        "--question",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="may be repeated",
    )
    options.add_files(
        questions,
        f".jsonl, .json, .csv, .tsv or .parquet with a question per row, {options.FILES}",
    )
    questions.add_argument(
        "--question-column",
        metavar="NAME",
        help="column with the questions: texts, or (not in CSV) lists of chat messages "
        "(default: question)",
    )
    questions.add_argument(
        "--answer-column",
        metavar="NAME",
        help="column with the right answers, to count what is correct (default: answer, where "
        "there is one)",
    )
    options.add_skip_empty(questions, "whose question is null, missing or empty")
    questions.add_argument(
        "--chat",
        action="store_true",
        help="take each question for a user's message, through the model's chat template",
    )
    rule = parser.add_argument_group("When to stop")
    rule.add_argument(
        "--scaler",
        default="expected_information_gain_reasoning",
        metavar="NAME",
        help="expected_information_gain_reasoning, entropy_threshold_reasoning or "
        "fixed_budget_reasoning (default: %(default)s)",
    )
    for name, bound in {**BOUNDS, **RIVAL_BOUNDS}.items():
        rule.add_argument(
            "--" + name.replace("_", "-"),
            type=bound.kind,
            metavar="N" if bound.kind is int else "X",
            help=f"{bound.help} (default: {bound.default:g})".replace("%", "%%"),
        )
    rule.add_argument(
        "--strict",
        action="store_true",
        help="refuse values out of range, instead of taking the nearest one",
    )
    rule.add_argument(
        "--estimator",
        metavar="NAME",
        help="of the gain: entropy_difference or mutual_information (default: entropy_difference)",
    )
    rule.add_argument(
        "--decide-at",
        default="step",
        metavar="WHERE",
        help="step (before every sample-length tokens) or end (where the model ends by itself) "
        "(default: %(default)s)",
    )
    answers = parser.add_argument_group("Answers")
    answers.add_argument(
        "--candidates",
        metavar="SOURCE",
        help="where candidate answers come from: beam or sampled (the model's own, after the "
        "cue), numeric or boxed (what its reasoning says) (default: beam)",
    )
    answers.add_argument(
        "--choices-column",
        metavar="NAME",
        help="column with a list of candidate answers for each question",
    )
    answers.add_argument(
        "--answer-cue",
        metavar="TEXT",
        help=r"asks for the answer, after the reasoning; \n is a line break "
        r"(default: \n\nThe answer is: )",
    )
    answers.add_argument(
        "--answer-end",
        metavar="TEXT",
        help=r"ends an answer; '' for nothing, EOS for the end-of-sequence token (default: \n)",
    )
    answers.add_argument(
        "--length-normalization",
        default="none",
        metavar="UNIT",
        help="divide the log-probability of an answer by its length: none, tokens or bytes "
        "(default: %(default)s)",
    )
    reasoning = parser.add_argument_group("Reasoning")
    reasoning.add_argument(
        "--max-tokens-thinking",
        type=int,
        metavar="TOKENS",
        help="tokens of reasoning at most (default: 1024)",
    )
    reasoning.add_argument(
        "--thinking-n-ignore",
        type=int,
        metavar="N",
        help="how often the model is told to go on where it ends its reasoning and a step pays "
        "(default: 4)",
    )
    reasoning.add_argument(
        "--think-end",
        action="extend",
        nargs="+",
        metavar="TEXT",
        help="ends the reasoning, e.g. </think>; may be repeated",
    )
    reasoning.add_argument(
        "--concurrency",
        type=int,
        default=32,
        metavar="N",
        help="questions side by side (default: %(default)s)",
    )
    options.add_output(
        parser,
        ("FILE.jsonl", "write a trace per line: each decision, its candidates, the reasoning"),
        ("FILE.html|.png|.svg|.pdf", "draw entropy and expected gain along each trace"),
    )
    parser.epilog = (
        options.ENGINE + "\n  --seed is also of what is sampled, and of the questions made here."
    )
