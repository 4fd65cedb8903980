"""The first token of a continuation, by the bytes of the text's tokens or by their offsets.

The tokens of a text, put together, are its bytes, but for the spaces that a tokenizer adds before
the text and behind a special token. So the tokens are followed back from the end of the text to
the cut. Where their bytes are not the text's (an unknown token, a normaliser that changes the
text), the offsets of a fast tokenizer say where a token's characters stand, even if it writes them
in another way or not at all.

A normaliser may compose a character from both sides of the cut (e + U+0301 to é), and the offsets
name only one of them; then the cut goes to the beginning of that character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vllm.score.data.tokenize import TokenBytes

# Characters on each side of the cut that a normaliser may look at.
_WINDOW = 64


class Tokens(NamedTuple):
    """Tokens of the end of a text.

    Attributes:
        ids: [n].
        whole: they begin where the text begins.
        offsets: [n], (start, end) of each in the text, where the tokenizer tells.
    """

    ids: Sequence[int]
    whole: bool = True
    offsets: Sequence[tuple[int, int]] = ()


class Cut(NamedTuple):
    """The place of the first token of a continuation.

    Attributes:
        token: index of it.
        start: where its text starts; before the cut if it also holds the end of the context.
    """

    token: int
    start: int


def find_cut(
    token_bytes: TokenBytes,
    tokens: Tokens,
    text: str,
    cut: int,
    normalize: Callable[[str], str] | None = None,
) -> Cut | None:
    """The first token that holds anything of text[cut:], by bytes where they tell, else by offsets.

    A space that the tokenizer adds counts to what follows it.

    Args:
        text: context and continuation.
        cut: length of the context.
        normalize: what the tokenizer does to a text beforehand. A character that it composes from
            both sides of the cut is the continuation's, with all its marks. Only with offsets.

    Returns:
        None if no token holds anything of it, or neither tells.
    """
    found = _by_bytes(token_bytes, tokens, text, cut, normalize) if token_bytes.known else None
    return found or _by_offsets(tokens.offsets, text, cut, normalize)


def _by_bytes(
    token_bytes: TokenBytes,
    tokens: Tokens,
    text: str,
    cut: int,
    normalize: Callable[[str], str] | None,
) -> Cut | None:
    found = _walk(token_bytes, tokens, text, cut)
    if found is not None:
        index, left = found
        return Cut(index, cut - left)
    if normalize is None or not tokens.offsets:
        return None
    begin = _composed_from(text, cut, normalize)
    changed, context = normalize(text), normalize(text[:begin])
    if not changed.startswith(context):
        return None
    found = _walk(token_bytes, Tokens(tokens.ids, tokens.whole), changed, len(context))
    if found is None:
        return None
    index, left = found
    return Cut(index, min(tokens.offsets[index][0], begin - 1) if left else begin)


def _by_offsets(
    offsets: Sequence[tuple[int, int]],
    text: str,
    cut: int,
    normalize: Callable[[str], str] | None,
) -> Cut | None:
    begin = _composed_from(text, cut, normalize) if normalize else cut
    index = len(offsets)
    while index and offsets[index - 1][1] > begin:
        index -= 1
    if index == len(offsets):
        return None
    start = offsets[index][0]
    return Cut(index, start if begin == cut else min(start, begin))


def _composed_from(text: str, cut: int, normalize: Callable[[str], str]) -> int:
    """Where the character starts, with its marks, that is composed from both sides of the cut; the
    cut itself if none is."""
    near = max(0, cut - _WINDOW)
    if normalize(text[near : cut + _WINDOW]).startswith(normalize(text[near:cut])):
        return cut
    begin = max(0, cut - 1)
    while begin and unicodedata.combining(text[begin]):
        begin -= 1
    return begin


def _walk(token_bytes: TokenBytes, tokens: Tokens, text: str, cut: int) -> tuple[int, int] | None:
    """(index of the token, characters left of the cut that it holds, whole or in part)."""
    written = token_bytes.of_text(text)
    end = len(token_bytes.of_text(text[:cut]))
    index, position = len(tokens.ids), len(written)
    for before, start in _backwards(token_bytes, tokens, text, written):
        if position < end or start < position == end:
            break
        index, position = before, start
    if position > end or index == len(tokens.ids):
        return None
    while written[position] & 0xC0 == 0x80:  # inside of a character
        position -= 1
    return index, len(written[position:end].decode())


def _backwards(
    token_bytes: TokenBytes, tokens: Tokens, text: str, written: bytes
) -> Iterator[tuple[int, int]]:
    """(index, where its bytes start in `written`) from the last token on, as far as they agree."""
    ids, offsets, position = tokens.ids, tokens.offsets, len(written)

    def place(character: int) -> int:
        return len(token_bytes.of_text(text[:character]))

    for index in range(len(ids) - 1, -1, -1):
        before = ids[index - 1] if index else None
        if not offsets and not token_bytes.greedy.isdisjoint((ids[index], before)):
            return
        if ids[index] in token_bytes.greedy:
            position = place(offsets[index][0])
            yield index, position
            continue
        low = place(offsets[index - 1][1]) if before in token_bytes.greedy else 0
        piece = token_bytes(ids[index])
        if not written.endswith(piece, low, position):
            begins = tokens.whole if before is None else before in token_bytes.added
            if not (
                begins and piece.startswith(b" ") and written.endswith(piece[1:], low, position)
            ):
                return
            piece = piece[1:]
        position -= len(piece)
        yield index, position
