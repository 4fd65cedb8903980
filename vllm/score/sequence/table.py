"""Results as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vllm.score.report.numbers import count, significant

_CHARACTERS = 19  # of a text, in an 80-column table


def results_table(results: Sequence[Mapping[str, Any]], limit: int = 50) -> Table:
    """One row a result, the first `limit` of them; a context is written once.

    `nats` is the log-probability, `a token` the same by the number of tokens.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("context", "sequence"):
        table.add_column(name, no_wrap=True)
    for name in ("nats", "prob", "tokens", "a token"):
        table.add_column(name, justify="right", no_wrap=True)
    previous: Any = None
    for row in results[:limit]:
        context = row["context"]
        shown = "" if context == previous else _end(_plain(context))
        previous = context
        table.add_row(
            Text(shown),
            Text(_begin(row["sequence"])),
            significant(row["log_prob"]),
            significant(row["prob"], 4),
            count(row["num_tokens"]),
            significant(row["log_prob_per_token"]),
        )
    return table


def notes(results: Sequence[Mapping[str, Any]], limit: int = 50) -> list[str]:
    """What the table does not say."""
    lines = []
    if len(results) > limit:
        lines.append(f"and {count(len(results) - limit)} more (--output, --json)")
    spanning = [row for row in results if row["spans_boundary"]]
    if spanning:
        first = spanning[0]
        lines.append(
            f"{count(len(spanning))} of {count(len(results))} scored from the start of a token "
            "that also holds the end of the context, as "
            f"{first['sequence'][:20]!r} with {first['spanned_context'][-20:]!r} before it"
        )
    return lines


def _plain(context: Any) -> str:
    return context if isinstance(context, str) else str(context[-1].get("content", ""))


def _end(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= _CHARACTERS else "…" + quoted[-_CHARACTERS + 1 :]


def _begin(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= _CHARACTERS else quoted[: _CHARACTERS - 1] + "…"
