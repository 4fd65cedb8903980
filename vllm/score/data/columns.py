"""Which column of a table is the text."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.score.errors import ScoreModeError


def text_column(columns: Iterable[str], wanted: str | None, source: str) -> str:
    """`wanted` or "text", if there is such a column.

    Raises:
        ScoreModeError: there is none; the message lists the columns.
    """
    names = list(columns)
    column = "text" if wanted is None else wanted
    if column in names:
        return column
    listed = ", ".join(repr(name) for name in names) or "none"
    raise ScoreModeError(
        f"text_column {column!r} is not in {source}; its columns are {listed}; "
        f"name the one that holds the text (text_column=, --text-column)"
    )
