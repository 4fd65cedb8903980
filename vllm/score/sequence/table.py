"""Results as a file, and as a table for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vllm.score.data.streams import atomic_write
from vllm.score.report.table import count, head, json_safe, plain_table, significant, tail

WRITABLE = (".csv", ".jsonl", ".parquet")
_CHARACTERS = 18  # of a text, in an 80-column table


def write_results(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row per result, with its keys as columns; the file is there entirely or not at all.

    What a column of text cannot hold (lists in CSV, messages also in Parquet) is written as JSON.
    JSON has no infinity: in JSON lines a perplexity beyond float64 is the string "Infinity".
    """
    with atomic_write(path) as file:
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            rows = [{**row, "context": _cell(row["context"])} for row in results]
            pq.write_table(pa.Table.from_pylist(rows), file)
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        if path.suffix.lower() == ".csv":
            writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: _cell(value) for k, value in row.items()} for row in results)
        else:
            for row in map(json_safe, results):
                text.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        text.detach()


def results_table(results: Sequence[Mapping[str, Any]], limit: int = 50) -> Table:
    """One row per result, the first `limit` of them; a context is written once.

    `nats` is the log-probability, `per token` the same by the number of tokens.
    """
    numbers = ("nats", "prob", "tokens", "per token")
    table = plain_table("context", "sequence", *numbers, right=numbers)
    previous: Any = None
    for row in results[:limit]:
        context, shown = row["context"], ""
        if context != previous:
            text = context if isinstance(context, str) else str(context[-1].get("content", ""))
            shown = tail(repr(text), _CHARACTERS)
        previous = context
        table.add_row(
            Text(shown),
            Text(head(repr(row["sequence"]), _CHARACTERS)),
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
            "that also holds the end of the context, e.g. "
            f"{first['sequence'][:20]!r} with {first['spanned_context'][-20:]!r} before it"
        )
    return lines


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, float, int)) else json.dumps(value, ensure_ascii=False)
