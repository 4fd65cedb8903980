"""The options of `vllm-score eig`: their names, and what they say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm.score.cli import options
from vllm.score.eig.rules import RULES

QUESTIONS, RULE, ANSWERS, REASONING = "Questions", "When to stop", "Answers", "Reasoning"


def _parameter(name: str) -> Any:
    """An option for a parameter of a scaler; None where it is not given."""
    known = {k: v for rule in RULES.values() for k, v in rule.parameters().items()}
    parameter = known[name]
    return typer.Option(
        "--" + name.replace("_", "-"),
        metavar="N" if parameter.type is int else "X",
        help=f"{parameter.help[0].upper()}{parameter.help[1:]}.",
        show_default=str(parameter.default),
        rich_help_panel=RULE,
    )


LambdaCost = Annotated[float | None, _parameter("lambda_cost")]
BeamSize = Annotated[int | None, _parameter("beam_size")]
McSamples = Annotated[int | None, _parameter("mc_samples")]
SampleLength = Annotated[int | None, _parameter("sample_length")]
Temperature = Annotated[float | None, _parameter("temperature")]
TopP = Annotated[float | None, _parameter("top_p")]
MaxComputationTime = Annotated[float | None, _parameter("max_computation_time")]
EntropyThreshold = Annotated[float | None, _parameter("entropy_threshold")]
FixedBudget = Annotated[int | None, _parameter("fixed_budget")]

Question = Annotated[
    list[str] | None,
    typer.Option("--question", metavar="TEXT", help="May be repeated.", rich_help_panel=QUESTIONS),
]
File = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        metavar="PATH",
        help=".jsonl, .json, .csv, .tsv or .parquet with a question a row, plain or compressed. "
        "Several: --file A B C.",
        rich_help_panel=QUESTIONS,
    ),
]
QuestionColumn = Annotated[
    str | None,
    typer.Option(
        "--question-column",
        metavar="NAME",
        help="Column with the questions: texts, or (not in CSV) lists of chat messages.",
        show_default="question",
        rich_help_panel=QUESTIONS,
    ),
]
AnswerColumn = Annotated[
    str | None,
    typer.Option(
        "--answer-column",
        metavar="NAME",
        help="Column with the right answers, to count what is correct.",
        show_default="answer, where there is one",
        rich_help_panel=QUESTIONS,
    ),
]
SkipEmpty = Annotated[
    bool,
    typer.Option(
        "--skip-empty",
        help="Leave out rows whose question is null, missing or empty, and say how many.",
        rich_help_panel=QUESTIONS,
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Take each question as a user's message, through the model's chat template.",
        rich_help_panel=QUESTIONS,
    ),
]

ScalerName = Annotated[
    str,
    typer.Option(
        "--scaler",
        metavar="NAME",
        help="expected_information_gain_reasoning, entropy_threshold_reasoning or "
        "fixed_budget_reasoning.",
        rich_help_panel=RULE,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse values out of range, instead of taking the nearest one.",
        rich_help_panel=RULE,
    ),
]
Estimator = Annotated[
    str | None,
    typer.Option(
        "--estimator",
        metavar="NAME",
        help="Of the gain: entropy_difference or mutual_information.",
        show_default="entropy_difference",
        rich_help_panel=RULE,
    ),
]
DecideAt = Annotated[
    str,
    typer.Option(
        "--decide-at",
        metavar="WHERE",
        help="step (before every sample-length tokens) or end (where the model ends by itself).",
        rich_help_panel=RULE,
    ),
]

Candidates = Annotated[
    str | None,
    typer.Option(
        "--candidates",
        metavar="SOURCE",
        help="Where candidate answers come from: beam or sampled (the model's own, after the cue), "
        "numeric or boxed (what its reasoning says).",
        show_default="beam",
        rich_help_panel=ANSWERS,
    ),
]
ChoicesColumn = Annotated[
    str | None,
    typer.Option(
        "--choices-column",
        metavar="NAME",
        help="Column with a list of candidate answers for each question.",
        rich_help_panel=ANSWERS,
    ),
]
AnswerCue = Annotated[
    str | None,
    typer.Option(
        "--answer-cue",
        metavar="TEXT",
        help=r"Asks for the answer, after the reasoning; \n is a line break.",
        show_default=r"\n\nThe answer is: ",
        rich_help_panel=ANSWERS,
    ),
]
AnswerEnd = Annotated[
    str | None,
    typer.Option(
        "--answer-end",
        metavar="TEXT",
        help=r"Ends an answer; '' for nothing, EOS for the end-of-sequence token.",
        show_default=r"\n",
        rich_help_panel=ANSWERS,
    ),
]
LengthNormalization = Annotated[
    str,
    typer.Option(
        "--length-normalization",
        metavar="UNIT",
        help="Divide the log-probability of an answer by its length: none, tokens or bytes.",
        rich_help_panel=ANSWERS,
    ),
]

MaxTokensThinking = Annotated[
    int | None,
    typer.Option(
        "--max-tokens-thinking",
        metavar="TOKENS",
        help="Tokens of reasoning at most.",
        show_default="1024",
        rich_help_panel=REASONING,
    ),
]
ThinkingNIgnore = Annotated[
    int | None,
    typer.Option(
        "--thinking-n-ignore",
        metavar="N",
        help="How often the model is told to go on where it ends its reasoning and a step pays.",
        show_default="4",
        rich_help_panel=REASONING,
    ),
]
ThinkEnd = Annotated[
    list[str] | None,
    typer.Option(
        "--think-end",
        metavar="TEXT",
        help="Ends the reasoning, as </think>. May be repeated.",
        rich_help_panel=REASONING,
    ),
]
Concurrency = Annotated[
    int,
    typer.Option(
        "--concurrency", metavar="N", help="Questions side by side.", rich_help_panel=REASONING
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        help="Of what is sampled, and of the questions made without --file.",
        rich_help_panel=REASONING,
    ),
]

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE.jsonl",
        help="Write one trace a line: each decision, its candidates, the reasoning.",
        rich_help_panel=options.OUTPUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.html|.png|.svg|.pdf",
        help="Draw entropy and expected gain along each trace.",
        rich_help_panel=options.OUTPUT,
    ),
]
