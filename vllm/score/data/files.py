"""Local files: plain text, JSON lines, CSV and Parquet."""

from __future__ import annotations

import codecs
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from vllm.score.data.columns import text_column
from vllm.score.data.source import Piece, Source, SpooledSource, documents_as_pieces
from vllm.score.errors import ScoreModeError

_READ = 1 << 20
# suffix (without .gz and the like) -> builder of `datasets`
_TABLES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


def file_source(
    paths: str | Path | Sequence[str | Path], *, text_column: str | None = None
) -> Source:
    """A local file, or several.

    A .jsonl, .json, .csv, .tsv or .parquet file (also compressed) holds one document a row; any
    other file is one document, read as it is (UTF-8).

    Args:
        text_column: of a table; by default "text".

    Raises:
        ScoreModeError: a file is missing, files of different kinds, or a column asked of a plain
            text file.
    """
    listed = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not listed:
        raise ScoreModeError("file: no file is named; give at least one")
    for path in listed:
        if not path.is_file():
            reason = "is a directory" if path.is_dir() else "does not exist"
            raise ScoreModeError(f"file {str(path)!r} {reason}; name a text or table file")
    if not any(path.stat().st_size for path in listed):
        names = ", ".join(str(path) for path in listed)
        raise ScoreModeError(f"file {names!r} is empty: there is nothing to score")
    kinds = {_TABLES.get(_bare_suffix(path)) for path in listed}
    if len(kinds) > 1:
        names = ", ".join(str(path) for path in listed)
        raise ScoreModeError(f"file: {names} are of different kinds; give files of one kind")
    kind = kinds.pop()
    if kind is not None:
        return TableFileSource(listed, kind, text_column)
    if text_column is not None:
        raise ScoreModeError(
            f"text_column is {text_column!r}, but {str(listed[0])!r} is a plain text file and has "
            "no columns; leave it out"
        )
    return TextFileSource(listed)


class TextFileSource(Source):
    """Plain text files in UTF-8, each one document, taken byte for byte (no newline is changed)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = ", ".join(str(path) for path in paths)
        self._paths = list(paths)

    def pieces(self) -> Iterator[Piece]:
        for document, path in enumerate(self._paths):
            with path.open("rb") as file:
                for text in decode_utf8(file, str(path)):
                    yield document, text

    def content_sha256(self) -> str | None:
        return _hash_files(self._paths)

    def size_bytes(self) -> int | None:
        return sum(path.stat().st_size for path in self._paths)


class TableFileSource(Source):
    """Rows of JSON lines, CSV or Parquet files, read as a stream through `datasets`."""

    def __init__(self, paths: Sequence[Path], kind: str, column: str | None) -> None:
        self.name = ", ".join(str(path) for path in paths)
        self._paths, self._kind, self._column = list(paths), kind, column

    def pieces(self) -> Iterator[Piece]:
        try:
            head = self._rows({})
            names = head.column_names or list(next(iter(head), {}))
            column = text_column(names, self._column, self.name)
            # Of a CSV field pandas would make a number, or nothing of an empty one or "NA".
            options: dict[str, Any] = {}
            if self._kind == "csv":
                options = {"converters": {column: str}, "na_filter": False}
            rows = self._rows(options)
            yield from documents_as_pieces((row[column] for row in rows), self.name)
        except ScoreModeError:
            raise
        except Exception as error:  # pyarrow's, pandas' and datasets' own kinds
            raise ScoreModeError(
                f"file {self.name!r} cannot be read as {self._kind}: {_first_line(error)}"
            ) from error

    def _rows(self, options: dict[str, Any]) -> Any:
        import datasets

        if self._kind == "csv" and _bare_suffix(self._paths[0]) == ".tsv":
            options = {**options, "sep": "\t"}
        files = [str(path.resolve()) for path in self._paths]
        return datasets.load_dataset(
            self._kind, data_files=files, split="train", streaming=True, **options
        )

    def content_sha256(self) -> str | None:
        return _hash_files(self._paths)

    def size_bytes(self) -> int | None:
        if self._kind == "parquet" or any(p.suffix in _COMPRESSED for p in self._paths):
            return None
        return sum(path.stat().st_size for path in self._paths)


def stdin_source(stream: IO[bytes] | None = None) -> Source:
    """Standard input (or another byte stream): one document in UTF-8."""
    stream = sys.stdin.buffer if stream is None else stream
    pieces = ((0, text) for text in decode_utf8(stream, "standard input"))
    return SpooledSource(pieces, "standard input")


def decode_utf8(stream: IO[bytes], name: str) -> Iterator[str]:
    """The text of a byte stream, in pieces, at least one (perhaps empty).

    Raises:
        ScoreModeError: for bytes that are not UTF-8, with their position.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    yield ""
    while True:
        data = stream.read(_READ)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ScoreModeError(
                f"{name}: byte {done - held + error.start} is not UTF-8 ({error.reason}); convert "
                "the text, for instance with iconv"
            ) from None
        done += len(data)
        if text:
            yield text
        if not data:
            return


def _bare_suffix(path: Path) -> str:
    bare = path.with_suffix("") if path.suffix in _COMPRESSED else path
    return bare.suffix.lower()


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = str(causes[-1]).strip() or type(causes[-1]).__name__
    return text.splitlines()[0]
