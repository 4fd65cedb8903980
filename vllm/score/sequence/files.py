"""Pairs from files, results to files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.score.errors import ScoreModeError

READABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
WRITABLE = (".csv", ".jsonl", ".parquet")


def read_pairs(
    path: Path, context_column: str = "context", target_column: str = "target"
) -> list[tuple[Any, str]]:
    """(context, target) of every row.

    Texts are taken as they stand: an empty field of a CSV file is an empty text, "NA" and "1" are
    texts. In JSON lines and Parquet a context may be a list of messages.

    Raises:
        ScoreModeError: the file or a column is missing, a row has none of it, or it cannot be
            read.
    """
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise ScoreModeError(
            f"file {str(path)!r} is of no kind that holds pairs; give one that ends in "
            f"{', '.join(READABLE)}"
        )
    if not path.is_file():
        raise ScoreModeError(f"file {str(path)!r} does not exist; name a file with pairs")
    columns = (context_column, target_column)
    read: Callable[[Path, tuple[str, str]], list[dict[str, Any]]]
    if suffix == ".parquet":
        read = _read_parquet
    else:
        read = _read_csv if suffix in (".csv", ".tsv") else _read_json_lines
    rows = read(path, columns)
    if not rows:
        raise ScoreModeError(f"file {str(path)!r} has no rows: there is nothing to score")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                raise ScoreModeError(f"file {str(path)!r}, row {number}: {column!r} is missing")
    return [(row[context_column], row[target_column]) for row in rows]


def _read_csv(path: Path, columns: tuple[str, str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    try:
        table = arrow_csv.read_csv(
            path,
            # One block: a row may be longer than the default one.
            read_options=arrow_csv.ReadOptions(block_size=min(path.stat().st_size + 1, 2**31 - 1)),
            parse_options=arrow_csv.ParseOptions(
                delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
            ),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string())
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error
    return _rows(path, table, columns)


def _read_parquet(path: Path, columns: tuple[str, str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _rows(path, pq.read_table(path), columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _rows(path: Path, table: Any, columns: tuple[str, str]) -> list[dict[str, Any]]:
    for column in columns:
        if column not in table.column_names:
            raise _no_column(path, column, table.column_names)
    rows: list[dict[str, Any]] = table.select(columns).to_pylist()
    return rows


def _read_json_lines(path: Path, columns: tuple[str, str]) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ScoreModeError(
                f"file {str(path)!r}, line {number} is not JSON: {error}"
            ) from error
        if not isinstance(row, dict):
            raise ScoreModeError(
                f"file {str(path)!r}, line {number} is {row!r:.40}; give an object a line"
            )
        for column in columns:
            if column not in row:
                raise _no_column(path, column, list(row))
        rows.append(row)
    return rows


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
    pq.write_table(pa.Table.from_pylist(rows), path)


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, float, int)) else json.dumps(value, ensure_ascii=False)


def _no_column(path: Path, column: str, columns: Sequence[str]) -> ScoreModeError:
    listed = ", ".join(map(repr, columns)) or "none"
    return ScoreModeError(
        f"column {column!r} is not in file {str(path)!r}; its columns are {listed}; name the "
        "right ones with --context-column and --target-column"
    )


def _unreadable(path: Path, error: Exception) -> ScoreModeError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ScoreModeError(f"file {str(path)!r} cannot be read: {reason}")
