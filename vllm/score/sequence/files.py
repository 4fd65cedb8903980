"""Pairs from files, results to files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.score.data.rows import Columns, Skipped, read_rows

WRITABLE = (".csv", ".jsonl", ".parquet")


def read_pairs(
    paths: Sequence[Path],
    context_column: str = "context",
    target_column: str = "target",
    *,
    skipped: Skipped | None = None,
) -> tuple[list[tuple[Any, str]], list[str]]:
    """(context, target) of every row, and what errors call the row.

    Texts are taken as they stand: an empty field of a CSV file is an empty text, "NA" and "1" are
    texts. In JSON and Parquet a context may be a list of messages.

    Args:
        skipped: counts the rows that are left out because one of the two is missing; None: an
            error.

    Raises:
        ScoreModeError: a file or a column is missing, a row has none of it, or it cannot be read.
    """
    columns = Columns(
        (context_column, target_column),
        remedy="name the right ones with --context-column and --target-column",
    )
    rows = list(read_rows(paths, columns, "pairs", skipped=skipped))
    pairs = [(row.fields[context_column], row.fields[target_column]) for row in rows]
    return pairs, [f"{row.path}, row {row.number}" for row in rows]


def write_results(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row a result, with its keys as columns; the file is there entirely or not at all.

    What a column of text cannot hold (lists in CSV, messages also in Parquet) is written as JSON.
    JSON has no infinity: in JSON lines a perplexity beyond float64 is the string "Infinity".
    """
    write = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}
    partial = path.with_name(path.name + ".tmp")
    write[path.suffix.lower()](results, partial)
    partial.replace(path)


def as_json(value: Any) -> Any:
    """`value` with each infinity as the string "Infinity"."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return "Infinity" if isinstance(value, float) and math.isinf(value) else value


def _write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]), lineterminator="\n")
        writer.writeheader()
        for row in results:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _write_json_lines(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in results:
            print(json.dumps(as_json(row), ensure_ascii=False, allow_nan=False), file=file)


def _write_parquet(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**row, "context": _cell(row["context"])} for row in results]
    with path.open("wb") as file:  # of a name pyarrow makes an address where it can
        pq.write_table(pa.Table.from_pylist(rows), file)


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, float, int)) else json.dumps(value, ensure_ascii=False)
