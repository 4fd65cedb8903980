"""Characters of texts and tokens made visible, and cut to a width."""

from __future__ import annotations

from collections.abc import Callable

_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
PART = "⋯"


def visible(text: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """The text in one line; what cannot be shown as its escape sequence.

    Args:
        drawable: whether a character can be shown (by a font).
    """
    return "".join(_MARKS.get(char) or (char if drawable(char) else _escape(char)) for char in text)


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


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
