"""Results as a file, and as a table for people."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vllm.score.report.numbers import count, significant

WRITABLE = (".csv", ".jsonl", ".parquet")
_CHARACTERS = 19  # of a text, in an 80-column table


def write_results(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row per result, with its keys as columns; the file is there entirely or not at all.

    What a column of text cannot hold (lists in CSV, messages also in Parquet) is written as JSON.
    JSON has no infinity: in JSON lines a perplexity beyond float64 is the string "Infinity".
    """
    kind, partial = path.suffix.lower(), path.with_name(path.name + ".tmp")
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{**row, "context": _cell(row["context"])} for row in results]
        with partial.open("wb") as binary:  # of a name pyarrow makes an address where it can
            pq.write_table(pa.Table.from_pylist(rows), binary)
    else:
        with partial.open("w", encoding="utf-8", newline="") as file:
            if kind == ".csv":
                writer = csv.DictWriter(file, list(results[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows({k: _cell(value) for k, value in row.items()} for row in results)
            else:
                lines = (
                    json.dumps(as_json(r), ensure_ascii=False, allow_nan=False) for r in results
                )
                file.writelines(f"{line}\n" for line in lines)
    partial.replace(path)


def as_json(value: Any) -> Any:
    """`value` with each infinity as the string "Infinity"."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return "Infinity" if isinstance(value, float) and math.isinf(value) else value


def results_table(results: Sequence[Mapping[str, Any]], limit: int = 50) -> Table:
    """One row per result, the first `limit` of them; a context is written once.

    `nats` is the log-probability, `a token` the same by the number of tokens.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("context", "sequence"):
        table.add_column(name, no_wrap=True)
    for name in ("nats", "prob", "tokens", "per token"):
        table.add_column(name, justify="right", no_wrap=True)
    previous: Any = None
    for row in results[:limit]:
        context, shown = row["context"], ""
        if context != previous:
            text = context if isinstance(context, str) else str(context[-1].get("content", ""))
            shown = repr(text)
            shown = shown if len(shown) <= _CHARACTERS else "…" + shown[-_CHARACTERS + 1 :]
        previous, sequence = context, repr(row["sequence"])
        table.add_row(
            Text(shown),
            Text(sequence if len(sequence) <= _CHARACTERS else sequence[: _CHARACTERS - 1] + "…"),
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
