"""Local files and standard input as sources: plain text, and tables with a document a row."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from vllm.score.data.columns import NAME_ANOTHER, TEXT_COLUMN
from vllm.score.data.rows import Columns, Skipped, read_rows, table_suffix
from vllm.score.data.source import Piece, Source, SpooledSource
from vllm.score.data.streams import (
    check_file,
    decode_utf8,
    decompressed,
    is_compressed,
    open_bytes,
)
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import check_encodable

_CONTENT = "a text"


def file_source(
    paths: str | Path | Sequence[str | Path],
    *,
    text_column: str | None = None,
    skip_empty: bool = False,
) -> Source:
    """A local file, or several of one kind.

    A .jsonl, .json, .csv, .tsv or .parquet file holds one document a row; any other file is one
    document (UTF-8, byte for byte but for a byte-order mark at its beginning). Each may be
    compressed by gzip, bz2, xz, zstd or lz4, whatever its name. Names are taken literally.

    Args:
        text_column: of a table; by default "text".
        skip_empty: of a table: leave out rows whose text is null, missing or empty.

    Raises:
        ScoreModeError: a file is missing, files of different kinds, or a column asked of a plain
            text file.
    """
    listed = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not listed:
        raise ScoreModeError("file: no file is named; give at least one")
    for path in listed:
        check_file(path, _CONTENT)
    names = ", ".join(str(path) for path in listed)
    if not any(path.stat().st_size for path in listed):
        raise ScoreModeError(f"file {names!r} is empty: there is nothing to score")
    kinds = {table_suffix(path) for path in listed}
    if None in kinds and len(kinds) > 1:
        raise ScoreModeError(f"file: {names} are of different kinds; give texts alone, or tables")
    if None not in kinds:
        return TableFileSource(listed, text_column, skip_empty=skip_empty)
    for field, value in (("text_column", text_column), ("skip_empty", skip_empty or None)):
        if value is not None:
            raise ScoreModeError(
                f"{field} (--{field.replace('_', '-')}) is {value!r}, but {str(listed[0])!r} is a "
                "plain text file and has no columns; leave it out"
            )
    return TextFileSource(listed)


class _FileSource(Source):
    """What sources of files share: a pass that checks and hashes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = ", ".join(str(path) for path in paths)
        self._paths = list(paths)
        self._checked: tuple[Any, str, int] | None = None

    def pieces(self) -> Iterator[Piece]:
        return self._pieces(None)

    def _pieces(self, digests: Sequence[Any] | None) -> Iterator[Piece]:
        """Args:
        digests: for each file a hash that is given its bytes.
        """
        raise NotImplementedError

    def check(self) -> None:
        if self._checked is not None and self._checked[0] == self._state():
            return
        state, size = self._state(), 0
        digests = [hashlib.sha256() for _ in self._paths]
        for document, text in self._pieces(digests):
            size += len(check_encodable(text, f"document {document}"))
        self._checked = state, _joint_hash(digests), size

    def content_sha256(self) -> str | None:
        if self._checked is not None and self._checked[0] == self._state():
            return self._checked[1]
        digests = []
        for path in self._paths:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256"))
        return _joint_hash(digests)

    def size_bytes(self) -> int | None:
        if self._checked is not None:
            return self._checked[2]
        if any(table_suffix(path) == ".parquet" or is_compressed(path) for path in self._paths):
            return None
        return sum(path.stat().st_size for path in self._paths)

    def _state(self) -> list[tuple[int, ...]]:
        """What changes when a file does."""
        found = (path.stat() for path in self._paths)
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in found]


class TextFileSource(_FileSource):
    """Plain text files in UTF-8, each one document, with every newline as it stands."""

    def _pieces(self, digests: Sequence[Any] | None) -> Iterator[Piece]:
        for document, path in enumerate(self._paths):
            with open_bytes(path, None if digests is None else digests[document]) as stream:
                for text in decode_utf8(stream, str(path)):
                    yield document, text


class TableFileSource(_FileSource):
    """Rows of tables, each one document."""

    def __init__(
        self, paths: Sequence[Path], column: str | None = None, *, skip_empty: bool = False
    ) -> None:
        super().__init__(paths)
        self._column = TEXT_COLUMN if column is None else column
        self.skip_empty = skip_empty
        self._skipped = Skipped((self._column,)) if skip_empty else None

    def _pieces(self, digests: Sequence[Any] | None) -> Iterator[Piece]:
        columns = Columns((self._column,), remedy=NAME_ANOTHER)
        rows = read_rows(self._paths, columns, _CONTENT, skipped=self._skipped, digests=digests)
        for document, row in enumerate(rows):
            text = row.fields[self._column]
            if not isinstance(text, str):
                raise ScoreModeError(
                    f"{row.where}: {self._column!r} is {text!r:.80} ({type(text).__name__}), not "
                    f"text; {NAME_ANOTHER}"
                )
            yield document, text

    def notes(self) -> list[str]:
        return [] if self._skipped is None else self._skipped.notes()


def stdin_source(stream: IO[bytes] | None = None) -> Source:
    """Standard input (or another byte stream): one document in UTF-8, perhaps compressed."""
    read: Callable[[int], bytes] = (sys.stdin.buffer if stream is None else stream).read
    name = "standard input"

    def pieces() -> Iterator[Piece]:
        for text in decode_utf8(decompressed(read, name), name):
            yield 0, text

    return SpooledSource(pieces(), name)


def _joint_hash(digests: Sequence[Any]) -> str:
    joint = hashlib.sha256()
    for digest in digests:
        joint.update(digest.digest())
    return joint.hexdigest()
