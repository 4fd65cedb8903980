"""Texts to be scored, as documents that arrive in pieces and can be read more than once.

A source is made of what a caller has (`as_source`), of files (`file_source`: plain text, or tables
with a document per row), or of standard input. None needs to fit in memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import IO, Any

from vllm.score.data.rows import FILL_IN, Columns, Skipped, no_column, read_rows, table_suffix
from vllm.score.data.streams import check_file, decode_utf8, decompressed, is_compressed, open_bytes
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import check_encodable

Piece = tuple[int, str]  # (number of the document, the next part of it)

TEXT_COLUMN = "text"
MAX_ID = 1 << 63  # larger numbers have no int64
_NAME_ANOTHER = "name the column that holds the text (text_column=, --text-column)"
_CONTENT = "a text"


class Source(ABC):
    """Documents of text.

    name: for reports.
    skip_empty: whether rows without a text are left out.
    """

    name: str
    skip_empty: bool = False
    _content: tuple[str, int] | None = None  # hash and bytes of UTF-8, once all has been read

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """(document, text) pairs from the beginning; documents are numbered from 0 without gaps,
        and the pieces of one follow each other. An empty document is one empty piece."""

    def check(self) -> None:
        """Read all of it once, so that a fault at its end is found before anything runs.

        Raises:
            ScoreModeError: it cannot be read, or is no text.
        """
        digest, size, last = hashlib.sha256(), 0, 0
        for document, text in self.pieces():
            data = check_encodable(text, f"document {document}")
            digest.update(b"\xff" * (document - last) + data)  # a byte that UTF-8 does not have
            size, last = size + len(data), document
        self._content = digest.hexdigest(), size

    def notes(self) -> list[str]:
        """Sentences for whoever reads the results, after `pieces` has been read."""
        return []

    def content_sha256(self) -> str | None:
        """Of all documents, as `check` has read them last; None where it has not."""
        return self._content and self._content[0]

    def size_bytes(self) -> int | None:
        """Bytes of UTF-8 in all documents, at least roughly; None if not known."""
        return self._content and self._content[1]


class DocumentsSource(Source):
    """Documents in memory."""

    def __init__(self, documents: Sequence[str], name: str = "documents") -> None:
        self.name = name
        self._documents = [text for _, text in _texts_only(documents, "documents")]

    def pieces(self) -> Iterator[Piece]:
        yield from enumerate(self._documents)

    def size_bytes(self) -> int | None:
        # A lone surrogate is refused where the text is tokenised, with the document's number.
        return sum(len(text.encode("utf-8", errors="surrogatepass")) for text in self._documents)


class TextSource(DocumentsSource):
    """One text in memory."""

    def __init__(self, text: str, name: str = "text") -> None:
        super().__init__([text], name)


class TokenIdsSource(Source):
    """Token ids, taken as they are: nothing is put in front but what a BOS rule says.

    documents: the ids of each document.
    """

    def __init__(self, documents: Sequence[Sequence[int]], name: str = "token ids") -> None:
        self.name = name
        self.documents = [[int(token) for token in document] for document in documents]

    def pieces(self) -> Iterator[Piece]:
        raise ScoreModeError("this source has token ids and no text")

    def check(self) -> None:
        pass

    def content_sha256(self) -> str | None:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(json.dumps(document).encode())
        return digest.hexdigest()


class SpooledSource(Source):
    """Pieces that can be produced only once, kept in a temporary file for reading again.

    The file is as long as what has been read.
    """

    def __init__(self, pieces: Iterable[Piece], name: str) -> None:
        self.name = name
        self._rest = iter(pieces)
        self._spool: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._end = 0

    def pieces(self) -> Iterator[Piece]:
        position = 0
        while True:
            while position < self._end:
                self._spool.seek(position)
                document, text = json.loads(self._spool.readline())
                position = self._spool.tell()
                yield document, text
            piece = next(self._rest, None)
            if piece is None:
                return
            self._spool.seek(self._end)
            self._spool.write(json.dumps(piece) + "\n")
            self._end = self._spool.tell()


class _ColumnSource(Source):
    """A column of a table: one document per row.

    Every pass over the rows counts those that it leaves out. They are the same rows in each, so
    the pass that got furthest knows most.
    """

    def __init__(self, name: str, column: str | None, skip_empty: bool) -> None:
        self.name = name
        self.skip_empty = skip_empty
        self._column = TEXT_COLUMN if column is None else column
        self._passes: list[Skipped] = []

    def notes(self) -> list[str]:
        furthest = max(self._passes, key=lambda skipped: skipped.rows, default=Skipped())
        return furthest.notes()

    def _new_pass(self) -> Skipped | None:
        if not self.skip_empty:
            return None
        self._passes.append(Skipped((self._column,)))
        return self._passes[-1]

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise ScoreModeError(
                f"{where}: {self._column!r} is {value!r:.80} ({type(value).__name__}), not text; "
                f"{_NAME_ANOTHER}"
            )
        return value


class DatasetSource(_ColumnSource):
    """A `datasets.Dataset` or `datasets.IterableDataset`: one document per row.

    Args:
        dataset: the rows.
        column: the text column; by default "text".
        skip_empty: leave out rows whose text is null or empty.
    """

    def __init__(
        self,
        dataset: Any,
        column: str | None = None,
        name: str = "dataset",
        *,
        skip_empty: bool = False,
    ) -> None:
        super().__init__(name, column, skip_empty)
        self._dataset = dataset
        names = dataset.column_names
        if names is None:  # a stream that has not been looked into
            names = list(next(iter(dataset), {}))
        if self._column not in names:
            raise no_column(name, self._column, names, _NAME_ANOTHER)

    def pieces(self) -> Iterator[Piece]:
        return enumerate(self._texts())

    def check(self) -> None:
        if hasattr(self._dataset, "__len__"):  # reading a stream twice may be costly
            super().check()

    def _texts(self) -> Iterator[str]:
        skipped = self._new_pass()
        batches = self._dataset.select_columns([self._column]).iter(batch_size=1000)
        values = chain.from_iterable(batch[self._column] for batch in batches)
        for number, value in enumerate(values, 1):
            where = f"{self.name}, row {number}"
            if skipped is not None and value in (None, ""):
                skipped.add(where, self._column)
            elif value is None:
                raise ScoreModeError(f"{where}: {self._column!r} is null; {FILL_IN}")
            else:
                yield self._text(value, where)


class _FileSource(_ColumnSource):
    """Files: tables with a document per row, or plain texts (UTF-8), each one document with every
    newline as it stands."""

    def __init__(self, paths: Sequence[Path], column: str | None, skip_empty: bool) -> None:
        super().__init__(", ".join(map(str, paths)), column, skip_empty)
        self._paths = list(paths)

    def pieces(self) -> Iterator[Piece]:
        if table_suffix(self._paths[0]) is None:
            for document, path in enumerate(self._paths):
                with open_bytes(path) as stream:
                    for text in decode_utf8(stream, str(path)):
                        yield document, text
            return
        columns = Columns((self._column,), remedy=_NAME_ANOTHER)
        rows = read_rows(self._paths, columns, _CONTENT, skipped=self._new_pass())
        for document, row in enumerate(rows):
            yield document, self._text(row.fields[self._column], row.where)

    def size_bytes(self) -> int | None:
        if self._content is not None:
            return self._content[1]
        if any(table_suffix(path) == ".parquet" or is_compressed(path) for path in self._paths):
            return None
        return sum(path.stat().st_size for path in self._paths)


def as_source(value: Any, *, text_column: str | None = None, skip_empty: bool = False) -> Source:
    """Make a source of what the caller has.

    Args:
        value: a text (str, never taken for a file name); a `pathlib.Path` of a file; a list of
            texts; token ids (list, array or tensor of integers), or a list of such; a
            `datasets.Dataset` or `IterableDataset`; any other iterable of texts; a `Source`.
        text_column: of a dataset or table file; by default "text".
        skip_empty: of a dataset or table file: leave out rows whose text is null, missing or empty.

    Raises:
        ScoreModeError: for anything else, or an empty list.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, str):
        return TextSource(value)
    if isinstance(value, Path):
        return file_source(value, text_column=text_column, skip_empty=skip_empty)
    if hasattr(value, "select_columns") and hasattr(value, "column_names"):
        return DatasetSource(value, text_column, skip_empty=skip_empty)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return _sequence_source(value)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, dict)):
        rest = iter(value)
        first = next(rest, None)
        if isinstance(first, str):
            return SpooledSource(_texts_only(chain([first], rest), "source"), "iterable of texts")
    raise ScoreModeError(
        f"source is {type(value).__name__}: give a text, a list of texts, token ids, a Path, a "
        "dataset of the datasets library, or a vllm.score.data source"
    )


def file_source(
    paths: str | Path | Sequence[str | Path],
    *,
    text_column: str | None = None,
    skip_empty: bool = False,
) -> Source:
    """A local file, or several of one kind.

    A .jsonl, .json, .csv, .tsv or .parquet file holds one document per row; any other file is one
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
    names = ", ".join(map(str, listed))
    if not any(path.stat().st_size for path in listed):
        raise ScoreModeError(f"file {names!r} is empty: there is nothing to score")
    tables = {table_suffix(path) is not None for path in listed}
    if len(tables) > 1:
        raise ScoreModeError(f"file: {names} are of different kinds; give texts alone, or tables")
    for field, value in (("text_column", text_column), ("skip_empty", skip_empty or None)):
        if value is not None and tables == {False}:
            raise ScoreModeError(
                f"{field} (--{field.replace('_', '-')}) is {value!r}, but {str(listed[0])!r} is a "
                "plain text file and has no columns; leave it out"
            )
    return _FileSource(listed, text_column, skip_empty)


def stdin_source(stream: IO[bytes] | None = None) -> Source:
    """Standard input (or another byte stream): one document in UTF-8, perhaps compressed."""
    read: Callable[[int], bytes] = (sys.stdin.buffer if stream is None else stream).read
    name = "standard input"

    def pieces() -> Iterator[Piece]:
        for text in decode_utf8(decompressed(read, name), name):
            yield 0, text

    return SpooledSource(pieces(), name)


def _sequence_source(value: list[Any] | tuple[Any, ...]) -> Source:
    if not value:
        raise ScoreModeError("source is empty: there is nothing to score")
    if all(_is_id(item) for item in value):
        return TokenIdsSource([list(value)])
    if all(isinstance(item, str) for item in value):
        return DocumentsSource(value)
    documents = [item.tolist() if hasattr(item, "tolist") else item for item in value]
    if all(isinstance(item, (list, tuple)) and all(map(_is_id, item)) for item in documents):
        return TokenIdsSource(documents)
    raise ScoreModeError(
        "source is a list of neither texts, nor token ids, nor lists of token ids "
        f"(its types: {', '.join(sorted({type(item).__name__ for item in value}))})"
    )


def _is_id(item: Any) -> bool:
    whole = isinstance(item, Integral) and not isinstance(item, bool)
    return whole and -MAX_ID < int(item) < MAX_ID


def _texts_only(documents: Iterable[Any], what: str) -> Iterator[Piece]:
    """Number the documents; raise ScoreModeError for one that is no text."""
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise ScoreModeError(
                f"{what}: document {index} is {document!r:.80} ({type(document).__name__}), not "
                "text; pass texts, or token ids alone"
            )
        yield index, document
