"""Which column of a table is the text."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.score.errors import ScoreModeError

TEXT_COLUMN = "text"
# What to do where the text column is another.
NAME_ANOTHER = "name the column that holds the text (text_column=, --text-column)"


def text_column(columns: Iterable[str], wanted: str | None, source: str) -> str:
    """`wanted` or "text", if there is such a column.

    Raises:
        ScoreModeError: there is none; the message lists the columns.
    """
    names = list(columns)
    column = TEXT_COLUMN if wanted is None else wanted
    if column in names:
        return column
    listed = ", ".join(repr(name) for name in names) or "none"
    raise ScoreModeError(
        f"column {column!r} is not in {source}; its columns are {listed}; {NAME_ANOTHER}"
    )
