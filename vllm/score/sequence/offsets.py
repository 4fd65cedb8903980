"""The first token of a continuation, by the offsets of a fast tokenizer.

Offsets say where a token's characters stand in the text even if it writes them in another way or
not at all. A normaliser may compose a character from both sides of the cut (e + U+0301 to é) and
name only one of them; then the cut goes to the beginning of that character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Characters on each side of the cut that a normaliser may look at.
_WINDOW = 64


@dataclass(frozen=True)
class Cut:
    """The place of the first token of a continuation.

    Attributes:
        index: of the token.
        start: where its text starts; before the cut if it also holds the end of the context.
    """

    index: int
    start: int


def find_cut(
    offsets: Sequence[tuple[int, int]],
    text: str,
    cut: int,
    normalize: Callable[[str], str] | None = None,
) -> Cut | None:
    """The first token that holds anything of text[cut:].

    Args:
        offsets: [n], (start, end) of each token in `text`.
        text: context and continuation.
        cut: length of the context.
        normalize: what the tokenizer does to a text beforehand.

    Returns:
        None if no token holds anything of it.
    """
    begin = cut
    if normalize is not None and _changes_context(text, cut, normalize):
        begin = character_start(text, cut)
    index = len(offsets)
    while index and offsets[index - 1][1] > begin:
        index -= 1
    if index == len(offsets):
        return None
    start = offsets[index][0]
    return Cut(index, start if begin == cut else min(start, begin))


def character_start(text: str, cut: int) -> int:
    """Where the last character of text[:cut] starts, with the marks that combine with it."""
    begin = max(0, cut - 1)
    while begin and unicodedata.combining(text[begin]):
        begin -= 1
    return begin


def _changes_context(text: str, cut: int, normalize: Callable[[str], str]) -> bool:
    """Whether the context, normalised, is another one with the continuation behind it."""
    begin = max(0, cut - _WINDOW)
    return not normalize(text[begin : cut + _WINDOW]).startswith(normalize(text[begin:cut]))
