"""The first token of a continuation, by the offsets of a fast tokenizer.

Offsets do not tell everything. A byte-level tokenizer may leave the space out of the offsets of
the token that holds it; such spaces are given back. A normaliser may compose a character from both
sides of the cut (e + U+0301 to é) and name only one of them; then the cut goes to the beginning of
that character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPACE = "Ġ"  # as byte-level vocabularies write it
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
    token: Callable[[int], str],
    offsets: Sequence[tuple[int, int]],
    text: str,
    cut: int,
    normalize: Callable[[str], str] | None = None,
) -> Cut | None:
    """The first token that holds anything of text[cut:].

    Args:
        token: the token at an index, as the vocabulary writes it.
        offsets: [n], (start, end) of each token in `text`.
        text: context and continuation.
        cut: length of the context.
        normalize: what the tokenizer does to a text beforehand.

    Returns:
        None if no token holds anything of it.
    """
    spans = _Spans(token, offsets, text)
    index = spans.first_beyond(cut)
    if normalize is not None and _changes_context(text, cut, normalize):
        begin = _character_start(text, cut)
        index = spans.first_beyond(begin)
        return None if index is None else Cut(index, min(spans.start(index), begin))
    return None if index is None else Cut(index, spans.start(index))


class _Spans:
    """Offsets with the spaces that were left out of them."""

    def __init__(
        self, token: Callable[[int], str], offsets: Sequence[tuple[int, int]], text: str
    ) -> None:
        self._token, self._offsets, self._text = token, offsets, text

    def first_beyond(self, position: int) -> int | None:
        """The first of the tokens from which on all end after `position`."""
        index = len(self._offsets)
        while index and self.end(index - 1) > position:
            index -= 1
        return None if index == len(self._offsets) else index

    def start(self, index: int) -> int:
        start = self._offsets[index][0]
        before = self.end(index - 1) if index else 0
        gap = self._text[before:start]
        if not gap.endswith(" "):
            return start
        token = self._token(index)
        return start - min(_leading(token, SPACE), _leading(gap[::-1], " "))

    def end(self, index: int) -> int:
        end = self._offsets[index][1]
        last = index + 1 == len(self._offsets)
        gap = self._text[end : None if last else self._offsets[index + 1][0]]
        if not gap.startswith(" "):
            return end
        token = self._token(index)
        if token.strip(SPACE):
            return end + min(_leading(token[::-1], SPACE), _leading(gap, " "))
        # Of a token of spaces the end is told right, but for the very first.
        return end if index else max(end, len(token))


def _leading(text: str, character: str) -> int:
    return len(text) - len(text.lstrip(character))


def _changes_context(text: str, cut: int, normalize: Callable[[str], str]) -> bool:
    """Whether the context, normalised, is another one with the continuation behind it."""
    begin = max(0, cut - _WINDOW)
    return not normalize(text[begin : cut + _WINDOW]).startswith(normalize(text[begin:cut]))


def _character_start(text: str, cut: int) -> int:
    """Where the last character of text[:cut] starts, with the marks that combine with it."""
    begin = max(0, cut - 1)
    while begin and unicodedata.combining(text[begin]):
        begin -= 1
    return begin
