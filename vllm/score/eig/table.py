"""A run over many questions as a table for people."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm.score.eig.types import Trace
from vllm.score.errors import ScoreModeError
from vllm.score.report.numbers import count, significant

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        questions: how many.
        answered: how many got an answer.
        judged: how many have a gold answer.
        correct: of those; a question without an answer is wrong.
        accuracy: correct / judged; None without gold answers.
        interval: Wilson's 95 % interval of the accuracy.
        reasoning_tokens: of all traces, with inserted prompts.
        tokens_sampled: all that were drawn, for decisions, too.
        decisions: of all traces.
        stops: count of traces by the reason of their last decision, the most frequent first.
        entropy_start, entropy_end: mean of H at the first and the last decision, nats, over the
            traces that have it; None where none has.
    """

    questions: int
    answered: int
    judged: int
    correct: int
    accuracy: float | None
    interval: tuple[float, float] | None
    reasoning_tokens: int
    tokens_sampled: int
    decisions: int
    stops: dict[str, int]
    entropy_start: float | None
    entropy_end: float | None


def summarize_run(
    traces: Sequence[Trace],
    gold: Sequence[str | None] | None = None,
    *,
    equal: Callable[[str, str], bool] = operator.eq,
) -> RunSummary:
    """Add up a run.

    Args:
        gold: the right answer to each question; None where it is not known.
        equal: whether an answer (first) is the gold answer (second).

    Raises:
        ScoreModeError: `gold` is of another length.
    """
    if gold is not None and len(gold) != len(traces):
        raise ScoreModeError(
            f"gold has {len(gold)} answers for {len(traces)} traces; give one each, None where it "
            "is not known"
        )
    pairs = [
        (trace.answer, right)
        for trace, right in zip(traces, gold or [None] * len(traces), strict=True)
        if right is not None
    ]
    correct = sum(answer is not None and bool(equal(answer, right)) for answer, right in pairs)
    entropies = [trace.entropies for trace in traces if trace.steps]
    stops = Counter(trace.steps[-1].decision.reason for trace in traces if trace.steps)
    return RunSummary(
        questions=len(traces),
        answered=sum(trace.answer is not None for trace in traces),
        judged=len(pairs),
        correct=correct,
        accuracy=correct / len(pairs) if pairs else None,
        interval=wilson_interval(correct, len(pairs)) if pairs else None,
        reasoning_tokens=sum(len(trace.reasoning_token_ids) for trace in traces),
        tokens_sampled=sum(trace.tokens_sampled for trace in traces),
        decisions=sum(len(trace.steps) for trace in traces),
        stops=dict(stops.most_common()),
        entropy_start=_mean([each[0] for each in entropies]),
        entropy_end=_mean([each[-1] for each in entropies]),
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion that also holds near 0 and 1 and for few trials (E. B. Wilson,
    Journal of the American Statistical Association 22, 1927, 209-212)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def print_run(summary: RunSummary, console: Console) -> None:
    """Print `run_table`."""
    console.print(run_table(summary))


def run_table(summary: RunSummary) -> Table:
    """One row a figure: the total, and the mean over the questions where there is one."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("a question", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    table.add_row("questions", count(summary.questions))
    table.add_row("answered", count(summary.answered))
    if summary.accuracy is not None and summary.interval is not None:
        low, high = (f"{100 * end:.1f}" for end in summary.interval)
        table.add_row(
            "correct",
            count(summary.correct),
            f"{100 * summary.accuracy:.1f} %",
            f"of {count(summary.judged)}, 95 % interval {low} to {high} %",
        )
    for name, total in (
        ("reasoning tokens", summary.reasoning_tokens),
        ("sampled tokens", summary.tokens_sampled),
        ("decisions", summary.decisions),
    ):
        mean = significant(total / summary.questions, 4) if summary.questions else "-"
        table.add_row(name, count(total), mean)
    for name, entropy in (
        ("entropy at the start", summary.entropy_start),
        ("entropy at the end", summary.entropy_end),
    ):
        table.add_row(name, "", "-" if entropy is None else significant(entropy, 4), "nats")
    for reason, number in summary.stops.items():
        table.add_row(f"stopped: {reason}", count(number))
    return table


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None
