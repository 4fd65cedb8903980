"""What the decisions of a process came to: counts, gains, times, failures."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from vllm.score.eig.types import FAILURE, TIME, Decision
from vllm.score.report.numbers import count, significant

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "unknown"  # kind of a failure that does not say


@dataclass
class Moments:
    """Running mean and variance of the finite values added.

    Updated one by one without cancellation (B. P. Welford, Technometrics 4, 1962, 419-420).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        """NaN and infinities are left out."""
        if not math.isfinite(value):
            return
        self.count += 1
        distance = value - self.mean
        self.mean += distance / self.count
        self.squares += distance * (value - self.mean)
        self.low, self.high = min(self.low, value), max(self.high, value)

    def summary(self) -> dict[str, Any]:
        """count, mean, std (n - 1 in the denominator), min, max; None where there is none."""
        some, several = self.count > 0, self.count > 1
        return {
            "count": self.count,
            "mean": self.mean if some else None,
            "std": math.sqrt(self.squares / (self.count - 1)) if several else None,
            "min": self.low if some else None,
            "max": self.high if some else None,
        }


class EIGMetrics:
    """Collects decisions; many threads may record at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._decisions = self._continued = self._failed = 0
        self._tokens_sampled = self._tokens_scored = 0
        self._stops: Counter[str] = Counter()
        self._gain, self._entropy, self._standard_error = Moments(), Moments(), Moments()
        self._seconds: dict[str, Moments] = {}
        self._failures: dict[str, dict[str, int]] = {}

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._clear()

    def record(self, decision: Decision) -> None:
        """Count one decision."""
        with self._lock:
            self._decisions += 1
            if decision.go_on:
                self._continued += 1
            else:
                self._stops[decision.reason] += 1
            if decision.posterior is not None:
                self._entropy.add(float(decision.posterior.entropy))
            if decision.estimate is not None:
                self._gain.add(float(decision.estimate.gain))
                self._standard_error.add(float(decision.estimate.standard_error))
            for component, seconds in decision.seconds.items():
                self._seconds.setdefault(component, Moments()).add(float(seconds))
            self._tokens_sampled += decision.tokens_sampled
            self._tokens_scored += decision.tokens_scored
            if decision.failure is not None or decision.reason in (FAILURE, TIME):
                self._failed += 1
                kind = UNKNOWN if decision.failure is None else decision.failure[0]
                row = self._failures.setdefault(kind, {"failure": 0, "time": 0})
                row["time" if decision.reason == TIME else "failure"] += 1

    def summary(self) -> dict[str, Any]:
        """All figures; None where nothing was recorded.

        Returns:
            decisions, continued: counts.
            continue_rate: their ratio.
            stops: count by reason.
            information_gain, entropy: see `Moments.summary`; nats, over the decisions that have
                one.
            standard_error: mean of the gains' standard errors, nats.
            seconds: {component: {"total", "mean"}}, the mean over the decisions that have it.
            tokens_sampled, tokens_scored: totals.
            success_rate: share of decisions without failure and within the time limit.
            failures: {kind: {"failure": n, "time": n}}.
        """
        with self._lock:
            n = self._decisions
            return {
                "decisions": n,
                "continued": self._continued,
                "continue_rate": self._continued / n if n else None,
                "stops": dict(sorted(self._stops.items())),
                "information_gain": self._gain.summary(),
                "entropy": self._entropy.summary(),
                "standard_error": self._standard_error.summary()["mean"],
                "seconds": {
                    name: {"total": each.mean * each.count, "mean": each.summary()["mean"]}
                    for name, each in self._seconds.items()
                },
                "tokens_sampled": self._tokens_sampled,
                "tokens_scored": self._tokens_scored,
                "success_rate": (n - self._failed) / n if n else None,
                "failures": {kind: dict(row) for kind, row in sorted(self._failures.items())},
            }


METRICS = EIGMetrics()


def get_eig_metrics_summary() -> dict[str, Any]:
    """The figures of this process; see `EIGMetrics.summary`."""
    return METRICS.summary()


def reset_eig_metrics() -> None:
    """Forget what this process has recorded."""
    METRICS.reset()


def print_eig_metrics(file: TextIO | None = None) -> None:
    """Print the figures of this process as tables, without colours where there is no terminal.

    Args:
        file: standard output by default.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False)
    for number, table in enumerate(metrics_tables(METRICS.summary())):
        if number:
            console.print()
        console.print(table)


def metrics_tables(summary: dict[str, Any]) -> list[Table]:
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
    for name in ("information_gain", "entropy"):
        row = summary[name]
        figures = (_figure(row[key]) for key in ("mean", "std", "min", "max"))
        nats.add_row(name.replace("_", " "), count(row["count"]), *figures)
    nats.add_row("standard error", "", _figure(summary["standard_error"]))
    tables = [counts, nats]

    if summary["seconds"]:
        times = _table("seconds", "total", "mean")
        for component, row in summary["seconds"].items():
            times.add_row(component, _figure(row["total"]), _figure(row["mean"]))
        tables.append(times)
    if summary["failures"]:
        failures = _table("failures", "failed", "time limit")
        for kind, row in summary["failures"].items():
            failures.add_row(kind, count(row["failure"]), count(row["time"]))
        tables.append(failures)
    return tables


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else significant(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
