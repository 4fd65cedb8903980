"""Numbers and characters as people (and JSON) read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

PART = "⋯"
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def significant(value: float, digits: int = 6) -> str:
    """A number with so many significant digits: all before the point, 4 after it at most.

    >>> significant(26.48123), significant(0.0123456), significant(2048.0), significant(1234.5, 3)
    ('26.4812', '0.0123', '2048.00', '1234')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    whole = math.floor(math.log10(abs(value))) + 1  # digits before the point; below 0.1 negative
    return f"{value:.{max(0, min(4, digits - whole))}f}"


def count(number: int) -> str:
    """A count with its thousands apart."""
    return f"{number:,}"


def short_hash(digest: str) -> str:
    """The first digits of a hash; words such as "unknown" as they are."""
    return digest[:12]


def json_safe(value: Any) -> Any:
    """`value` with each infinity, which JSON does not have, as the string "Infinity"."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def visible(text: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """The text in one line; what cannot be shown as its escape sequence.

    Args:
        drawable: whether a character can be shown (by a font).
    """

    def mark(char: str) -> str:
        shown = char if drawable(char) else char.encode("unicode_escape").decode("ascii")
        return _MARKS.get(char, shown)

    return "".join(map(mark, text))


def visible_token(
    text: str | None, token_id: int, drawable: Callable[[str], bool] = str.isprintable
) -> str:
    """The same of a token, with a mark for each space; `PART` for a later part of a character that
    several tokens make up; the id where the characters are not known."""
    if text is None:
        return f"[{token_id}]"
    return visible(text, drawable).replace(" ", "␣") or PART


def head(text: str, width: int) -> str:
    """The text, or its beginning and a mark in `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def tail(text: str, width: int) -> str:
    """The text, or a mark and its end in `width` characters."""
    return text if len(text) <= width else "…" + text[1 - width :]
