"""What decisions and runs came to: metrics of the process, the table of a run, traces as a file."""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO, TypedDict

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from vllm.score.data.streams import atomic_write
from vllm.score.eig.records import FAILURE, TIME, Decision, GainEstimate, Step, Trace
from vllm.score.errors import ScoreModeError
from vllm.score.report.table import count, plain_table, significant

UNKNOWN = "unknown"  # kind of a failure that does not say


class Moments(TypedDict):
    """Of the finite values; `std` with n - 1 in the denominator; None where there is none."""

    count: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class MetricsSummary(TypedDict):
    """What decisions came to; None where nothing was recorded.

    Attributes:
        decisions, continued: counts.
        continue_rate: their ratio.
        stops: count by reason.
        information_gain, entropy: nats, over the decisions that have one.
        standard_error: mean of the gains' standard errors, nats.
        seconds: {component: {"total", "mean"}}, the mean over the decisions that have it.
        tokens_sampled, tokens_scored: totals.
        success_rate: share of decisions without failure and within the time limit.
        failures: {kind: {"failure": n, "time": n}}.
    """

    decisions: int
    continued: int
    continue_rate: float | None
    stops: dict[str, int]
    information_gain: Moments
    entropy: Moments
    standard_error: float | None
    seconds: dict[str, dict[str, float]]
    tokens_sampled: int
    tokens_scored: int
    success_rate: float | None
    failures: dict[str, dict[str, int]]


class EIGMetrics:
    """Collects decisions; many threads may record at once (what a list's `append` allows)."""

    def __init__(self) -> None:
        self._made: list[Decision] = []  # without their forecasts, which take memory

    def reset(self) -> None:
        """Forget everything."""
        self._made = []

    def record(self, decision: Decision) -> None:
        """Count one decision."""
        self._made.append(replace(decision, forecast=None))

    def summary(self) -> MetricsSummary:
        """All figures."""
        made = list(self._made)
        n, continued = len(made), sum(each.go_on for each in made)
        estimates = [each.estimate for each in made if each.estimate is not None]
        seconds: dict[str, list[float]] = {}
        failures: dict[str, dict[str, int]] = {}
        for each in made:
            for component, value in each.seconds.items():
                seconds.setdefault(component, []).append(value)
            if each.failure is not None or each.reason in (FAILURE, TIME):
                kind, _ = each.failure or (UNKNOWN, "")
                row = failures.setdefault(kind, {"failure": 0, "time": 0})
                row["time" if each.reason == TIME else "failure"] += 1
        failed = sum(map(sum, (row.values() for row in failures.values())))
        return {
            "decisions": n,
            "continued": continued,
            "continue_rate": continued / n if n else None,
            "stops": dict(sorted(Counter(d.reason for d in made if not d.go_on).items())),
            "information_gain": _moments(each.gain for each in estimates),
            "entropy": _moments(d.posterior.entropy for d in made if d.posterior is not None),
            "standard_error": _moments(each.standard_error for each in estimates)["mean"],
            "seconds": {
                name: {"total": math.fsum(each), "mean": math.fsum(each) / len(each)}
                for name, each in seconds.items()
            },
            "tokens_sampled": sum(each.tokens_sampled for each in made),
            "tokens_scored": sum(each.tokens_scored for each in made),
            "success_rate": (n - failed) / n if n else None,
            "failures": dict(sorted(failures.items())),
        }


def _moments(values: Iterable[float]) -> Moments:
    """Of the finite values."""
    found = np.array([value for value in values if math.isfinite(value)])
    n = len(found)
    return {
        "count": n,
        "mean": float(found.mean()) if n else None,
        "std": float(found.std(ddof=1)) if n > 1 else None,
        "min": float(found.min()) if n else None,
        "max": float(found.max()) if n else None,
    }


METRICS = EIGMetrics()


def get_eig_metrics_summary() -> MetricsSummary:
    """The figures of this process."""
    return METRICS.summary()


def reset_eig_metrics() -> None:
    """Forget what this process has recorded."""
    METRICS.reset()


def print_eig_metrics(file: TextIO | None = None) -> None:
    """Print the figures of this process as tables, without colours where there is no terminal.

    Args:
        file: standard output by default.
    """
    print_tables(Console(file=file, highlight=False), metrics_tables(METRICS.summary()))


def print_tables(console: Console, tables: Sequence[Table]) -> None:
    """With a blank line between them."""
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)


def metrics_tables(summary: MetricsSummary) -> list[Table]:
    """Counts; gain and entropy; time by component; failures, where there are any."""
    counts = _table("decisions", count(summary["decisions"]))
    counts.add_row("continued", count(summary["continued"]))
    counts.add_row("continue rate", _percent(summary["continue_rate"]))
    for reason, number in summary["stops"].items():
        counts.add_row(f"stopped: {reason}", count(number))
    counts.add_row("success rate", _percent(summary["success_rate"]))
    counts.add_row("tokens sampled", count(summary["tokens_sampled"]))
    counts.add_row("tokens scored", count(summary["tokens_scored"]))

    nats = _table("nats", "count", "mean", "std", "min", "max")
    for name, row in (
        ("information gain", summary["information_gain"]),
        ("entropy", summary["entropy"]),
    ):
        figures = (_figure(row[key]) for key in ("mean", "std", "min", "max"))
        nats.add_row(name, count(row["count"]), *figures)
    nats.add_row("standard error", "", _figure(summary["standard_error"]))
    tables = [counts, nats]

    if summary["seconds"]:
        times = _table("seconds", "total", "mean")
        for component, each in summary["seconds"].items():
            times.add_row(component, _figure(each["total"]), _figure(each["mean"]))
        tables.append(times)
    if summary["failures"]:
        failures = _table("failures", "failed", "time limit")
        for kind, numbers in summary["failures"].items():
            failures.add_row(kind, count(numbers["failure"]), count(numbers["time"]))
        tables.append(failures)
    return tables


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
    _check_length("gold", gold, traces)
    pairs = [
        (trace.answer, right)
        for trace, right in zip(traces, gold or [None] * len(traces), strict=True)
        if right is not None
    ]
    correct = sum(answer is not None and bool(equal(answer, right)) for answer, right in pairs)
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
        stops=dict(Counter(trace.steps[-1].decision.reason for trace in traces).most_common()),
        entropy_start=_moments(trace.entropies[0] for trace in traces)["mean"],
        entropy_end=_moments(trace.entropies[-1] for trace in traces)["mean"],
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion that also holds near 0 and 1 and for few trials (E. B. Wilson,
    Journal of the American Statistical Association 22, 1927, 209-212)."""
    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def run_table(summary: RunSummary) -> Table:
    """One row per figure: the total, and the mean over the questions where there is one."""
    table = _table("", "total", "per question")
    table.columns[0].style = "cyan"
    table.add_column("", overflow="fold")
    table.add_row("questions", count(summary.questions))
    table.add_row("answered", count(summary.answered))
    if summary.accuracy is not None and summary.interval is not None:
        low, high = (f"{100 * end:.1f}" for end in summary.interval)
        table.add_row(
            "correct",
            count(summary.correct),
            _percent(summary.accuracy),
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


def _table(*columns: str) -> Table:
    return plain_table(*columns, right=columns[1:])


def _figure(value: float | None) -> str:
    return "-" if value is None else significant(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def write_traces(
    traces: Sequence[Trace],
    path: str | Path,
    *,
    questions: Sequence[str] | None = None,
    gold: Sequence[str | None] | None = None,
) -> None:
    """One JSON object per line for each trace, see `trace_record`; the file is there entirely or
    not.

    Args:
        questions: their texts, one per trace.
        gold: the right answers, one per trace; None where it is not known.

    Raises:
        ScoreModeError: `questions` or `gold` is of another length.
    """
    given = {"question": questions, "gold": gold}
    beside = {name: values for name, values in given.items() if values is not None}
    _check_length("questions", questions, traces)
    _check_length("gold", gold, traces)
    with atomic_write(Path(path)) as file:
        for number, trace in enumerate(traces):
            record = {name: values[number] for name, values in beside.items()}
            # Escapes beyond ASCII: no reader takes U+2028 for the end of a line.
            line = json.dumps(record | trace_record(trace), allow_nan=False) + "\n"
            file.write(line.encode())


def _check_length(name: str, given: Sequence[Any] | None, traces: Sequence[Trace]) -> None:
    if given is not None and len(given) != len(traces):
        raise ScoreModeError(
            f"{name} has {len(given)} entries for {len(traces)} traces; give one each, None where "
            "it is not known"
        )


def trace_record(trace: Trace) -> dict[str, Any]:
    """A trace as JSON has it: nats, tokens, seconds; null for NaN and for what is not there."""
    return {
        "answer": trace.answer,
        "ended": trace.ended,
        "reasoning": trace.reasoning,
        "reasoning_tokens": len(trace.reasoning_token_ids),
        "tokens_sampled": trace.tokens_sampled,
        "prompt_token_ids": [int(token) for token in trace.prompt_token_ids],
        "reasoning_token_ids": [int(token) for token in trace.reasoning_token_ids],
        "steps": [_step_record(step) for step in trace.steps],
    }


def _step_record(step: Step) -> dict[str, Any]:
    decision, posterior = step.decision, step.decision.posterior
    estimates = [each.name for each in fields(GainEstimate) if each.name != "entropy"]
    candidates = []
    if posterior is not None:
        rows = zip(posterior.answers, posterior.logprobs, posterior.log_posterior, strict=True)
        candidates = [
            {"answer": answer, "logprob": _number(own), "posterior": _number(math.exp(share))}
            for answer, own, share in rows
        ]
    return {
        "position": step.position,
        "go_on": decision.go_on,
        "reason": decision.reason,
        "entropy": _number(getattr(posterior, "entropy", None)),
        **{name: _number(getattr(decision.estimate, name, None)) for name in estimates},
        "coverage": _number(getattr(posterior, "coverage", None)),
        "candidates": candidates,
        "failure": decision.failure
        and {"kind": decision.failure[0], "message": decision.failure[1]},
        "seconds": {name: _number(value) for name, value in decision.seconds.items()},
        "tokens_sampled": decision.tokens_sampled,
        "tokens_scored": decision.tokens_scored,
        "prompt": step.prompt,
        "text": step.text,
        "tokens": step.tokens,
    }


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
