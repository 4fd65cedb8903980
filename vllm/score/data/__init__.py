"""Where the text comes from: strings, token ids, local files, standard input, `datasets`.

`as_source` takes what a caller has in hand; `file_source`, `hub_source` and `stdin_source` take
names. All give a `Source`: documents in pieces, which need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

from vllm.score.data.files import file_source, stdin_source
from vllm.score.data.source import (
    DocumentsSource,
    Source,
    SpooledSource,
    TextSource,
    TokenIdsSource,
    documents_as_pieces,
)
from vllm.score.data.tables import DatasetSource, hub_source
from vllm.score.errors import ScoreModeError

__all__ = [
    "DatasetSource",
    "DocumentsSource",
    "Source",
    "SpooledSource",
    "TextSource",
    "TokenIdsSource",
    "as_source",
    "file_source",
    "hub_source",
    "stdin_source",
]


# Larger numbers have no int64.
MAX_ID = 1 << 63


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
            pieces = documents_as_pieces(chain([first], rest), "source")
            return SpooledSource(pieces, "iterable of texts")
    raise ScoreModeError(
        f"source is {type(value).__name__}: give a text, a list of texts, token ids, a Path, a "
        "dataset of the datasets library, or a vllm.score.data source"
    )


def _sequence_source(value: list[Any] | tuple[Any, ...]) -> Source:
    if not value:
        raise ScoreModeError("source is empty: there is nothing to score")
    if all(_is_id(item) for item in value):
        return TokenIdsSource([list(value)])
    if all(isinstance(item, str) for item in value):
        return DocumentsSource(list(value))
    documents = [item.tolist() if hasattr(item, "tolist") else item for item in value]
    if all(
        isinstance(item, (list, tuple)) and all(_is_id(token) for token in item)
        for item in documents
    ):
        return TokenIdsSource(documents)
    raise ScoreModeError(
        "source is a list of neither texts, nor token ids, nor lists of token ids "
        f"(its types: {', '.join(sorted({type(item).__name__ for item in value}))})"
    )


def _is_id(item: Any) -> bool:
    whole = isinstance(item, Integral) and not isinstance(item, bool)
    return whole and -MAX_ID < int(item) < MAX_ID
