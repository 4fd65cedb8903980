"""Rows of tables in files: JSON lines, JSON, CSV, TSV and Parquet, plain or compressed.

Everything that reads a table reads it here. Files are read as streams, row by row (Parquet in
batches; a .json file that is one list as a whole), and of each row only the wanted columns.
Fields of CSV are texts as they stand: "", "NA" and "1" are texts.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from vllm.score.data.streams import BOM, CONVERT, check_file, is_compressed, open_bytes
from vllm.score.errors import ScoreModeError, first_line

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Characters of a CSV field. Without a limit a quote that is never closed takes all memory.
_LARGEST_FIELD = 1 << 28
_BATCH_ROWS = 256
SKIP = "leave such rows out with --skip-empty (skip_empty=True)"
FILL_IN = f"fill it in, or {SKIP}"


class Row(NamedTuple):
    """One row of a table.

    number: of the row in its file, from 1.
    line: that it begins at, in a text file that is read by lines; else None, or the number.
    fields: the wanted columns that it has.
    columns: all columns that it has.
    """

    path: Path
    number: int
    line: int | None
    fields: dict[str, Any]
    columns: Sequence[str]

    @property
    def where(self) -> str:
        line = "" if self.line in (None, self.number) else f" (line {self.line})"
        return f"file {str(self.path)!r}, row {self.number}{line}"


@dataclass
class Columns:
    """Which columns are read.

    required: of every row.
    optional: a row, or a whole file, may leave them out.
    remedy: what to do where a column is not there: "name another with --x-column".
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    remedy: str = ""


@dataclass
class Skipped:
    """Rows that one pass leaves out because a required column is null or missing.

    texts: columns in which an empty text is as good as none.
    rows: how many were left out; first: the first of them.
    """

    texts: tuple[str, ...] = ()
    rows: int = 0
    first: str = ""
    columns: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, column: str) -> None:
        self.rows += 1
        self.first = self.first or where
        self.columns[column] = self.columns.get(column, 0) + 1

    def notes(self) -> list[str]:
        """A sentence for whoever reads the results, if rows were left out."""
        if not self.rows:
            return []
        columns = " or ".join(repr(column) for column in self.columns)
        rows = "1 row was" if self.rows == 1 else f"{self.rows} rows were"
        return [f"{rows} skipped, without a value in {columns}: the first is {self.first}"]


def table_suffix(path: Path) -> str | None:
    """The suffix in `READABLE` that the name ends in, compressed or not; None for no table."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READABLE else None


def check_table(path: Path, content: str) -> None:
    """Raise ScoreModeError for a file that is not there or no table by its name.

    Args:
        content: what its rows are, for errors ("pairs").
    """
    if table_suffix(path) is None and not path.is_dir():
        raise ScoreModeError(
            f"file {str(path)!r} is of no kind that holds {content}; give one that ends in "
            f"{', '.join(READABLE)} (also compressed: {', '.join(COMPRESSIONS)})"
        )
    check_file(path, content)


def read_rows(
    paths: Sequence[Path], columns: Columns, content: str, *, skipped: Skipped | None = None
) -> Iterator[Row]:
    """The rows of one or several files, at least one row.

    Args:
        content: what the rows are, for errors ("pairs").
        skipped: rows without a required value are counted here and left out; None: an error.

    Raises:
        ScoreModeError: a file is not there, damaged or no table; it lacks a required column, or
            has a wanted one twice; a row lacks a required value; there are no rows, or all are
            left out.
    """
    any_row = any_value = False
    for path in paths:
        check_table(path, content)
        columns_seen: set[str] = set()
        row: Row | None = None
        for row in _file_rows(path, columns):
            any_row = True
            columns_seen.update(row.fields)
            without = _without_value(row, columns.required, skipped)
            if without is None:
                any_value = True
                yield row
            elif skipped is not None:
                skipped.add(row.where, without)
            elif without not in columns_seen:  # perhaps no row of the file has it
                remedy = f"{columns.remedy}, or {SKIP}"
                raise no_column(row.where, without, row.columns, remedy)
            else:
                there = ", ".join(map(repr, row.columns)) or "nothing"
                what = "is null" if without in row.fields else f"is missing (it has {there})"
                raise ScoreModeError(f"{row.where}: {without!r} {what}; {FILL_IN}")
        for column in columns.required:
            if row is not None and column not in columns_seen:
                raise no_column(f"file {str(path)!r}", column, row.columns, columns.remedy)
    if not any_value:
        names = ", ".join(str(path) for path in paths)
        listed = " or ".join(map(repr, columns.required))
        missing = f"row with a value in {listed}" if any_row else "rows"
        raise ScoreModeError(f"file {names!r} has no {missing}; name a file with {content}")


def _without_value(row: Row, required: Sequence[str], skipped: Skipped | None) -> str | None:
    for column in required:
        value = row.fields.get(column)
        if value is None or (value == "" and skipped is not None and column in skipped.texts):
            return column
    return None


def no_column(where: str, column: str, columns: Sequence[str], remedy: str) -> ScoreModeError:
    """The error of a table without a wanted column."""
    listed = ", ".join(map(repr, columns))
    its = f"its columns are {listed}" if listed else "it has no columns"
    return ScoreModeError(f"column {column!r} is not in {where}; {its}; {remedy}")


def _file_rows(path: Path, columns: Columns) -> Iterator[Row]:
    suffix = table_suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path, columns)
        return
    is_csv = suffix in (".csv", ".tsv")
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="" if is_csv else "\n")
        try:
            if is_csv:
                yield from _csv(path, columns, text, "\t" if suffix == ".tsv" else ",")
            else:
                head = stream.peek(1).removeprefix(BOM.encode()).lstrip()
                is_list = suffix == ".json" and head.startswith(b"[")
                yield from _json(path, columns, text, is_list)
        except UnicodeDecodeError:
            raise _undecodable(path) from None


def _wanted(path: Path, header: Sequence[str], columns: Columns) -> list[str]:
    """The wanted columns that a file with this header has."""
    wanted = dict.fromkeys((*columns.required, *columns.optional))
    for column in wanted:
        if header.count(column) > 1:
            listed = ", ".join(map(repr, header))
            raise ScoreModeError(
                f"column {column!r} is in file {str(path)!r} more than once; its columns are "
                f"{listed}; rename one of them"
            )
    for column in columns.required:
        if column not in header:
            raise no_column(f"file {str(path)!r}", column, header, columns.remedy)
    return [column for column in wanted if column in header]


def _csv(path: Path, columns: Columns, text: IO[str], delimiter: str) -> Iterator[Row]:
    records = _records(path, csv.reader(text, delimiter=delimiter, strict=True))
    _, header = next(records, (0, []))
    if not header:
        return
    places = {column: header.index(column) for column in _wanted(path, header, columns)}
    for number, (line, record) in enumerate(records, 1):
        if len(record) > len(header):
            raise ScoreModeError(
                f"file {str(path)!r}, line {line} has {len(record)} fields, the header has "
                f"{len(header)}; put a field that holds a {delimiter!r} into double quotes"
            )
        fields = {c: record[place] for c, place in places.items() if place < len(record)}
        yield Row(path, number, line, fields, header[: len(record)])


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Records that are not empty, with the line that each begins at."""
    while True:
        line = reader.line_num + 1
        # The limit is the module's: others get theirs back.
        limit = csv.field_size_limit(_LARGEST_FIELD)
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = {
                "unexpected end of data": "a quote is opened there and never closed",
                f"field larger than field limit ({_LARGEST_FIELD})": (
                    f"a field has more than {_LARGEST_FIELD} characters; is a quote never closed?"
                ),
            }.get(str(error), str(error))
            raise ScoreModeError(
                f"file {str(path)!r}, the row at line {line} cannot be read: {reason}; put a field "
                "with quotes or line breaks into double quotes, and double the quotes in it"
            ) from error
        finally:
            csv.field_size_limit(limit)
        if record:
            yield line, record


def _undecodable(path: Path) -> ScoreModeError:
    """Where a file that is not UTF-8 is not."""
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return ScoreModeError(
                    f"file {str(path)!r}, line {number}: byte {error.start} of the line is not "
                    f"UTF-8 ({error.reason}); {CONVERT}"
                )
    return ScoreModeError(f"file {str(path)!r} changed while it was read; run it again")


def _json(path: Path, columns: Columns, text: IO[str], is_list: bool) -> Iterator[Row]:
    wanted = dict.fromkeys((*columns.required, *columns.optional))
    file = f"file {str(path)!r}"
    if is_list:
        rows: Iterable[tuple[int, Any]] = enumerate(_parsed(text.read(), file), 1)
    else:
        lines = ((line, row) for line, row in enumerate(text, 1) if row.strip())
        rows = ((line, _parsed(row.rstrip(), f"{file}, line {line}")) for line, row in lines)
    for number, (line, row) in enumerate(rows, 1):
        if not isinstance(row, dict):
            where = f"item {number}" if is_list else f"line {line}"
            per = "item" if is_list else "line (a list of them is for a .json file)"
            raise ScoreModeError(f"{file}, {where} is {row!r:.40}; give an object per {per}")
        fields = {column: row[column] for column in wanted if column in row}
        yield Row(path, number, line, fields, list(row))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError) and error.lineno == 1:
            reason = f"{error.msg} at character {error.pos + 1}"
        raise ScoreModeError(
            f"{where} is not JSON: {reason}; give an object per line, or a list of objects in a "
            ".json file"
        ) from error


def _parquet(path: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _seekable(path) as file:
        try:
            # A file object: of a name pyarrow makes an address where it can.
            table = pq.ParquetFile(file)
            header = table.schema_arrow.names
            batches = table.iter_batches(_BATCH_ROWS, columns=_wanted(path, header, columns))
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, fields in enumerate(rows, 1):
                yield Row(path, number, None, fields, header)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, ScoreModeError):
                raise
            raise ScoreModeError(
                f"file {str(path)!r} cannot be read as Parquet: {first_line(error)}; it is damaged "
                "or of another kind, make it anew"
            ) from error


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """What Parquet can be read from: the file, or a temporary one with its decompressed bytes."""
    with tempfile.TemporaryFile() if is_compressed(path) else path.open("rb") as file:
        if is_compressed(path):
            with open_bytes(path, text=False) as stream:
                shutil.copyfileobj(stream, file)
        yield file
