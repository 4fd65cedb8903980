"""Tokenising a text that arrives in pieces, as if the whole text were tokenised at once.

The text is tokenised in blocks that overlap. A token sequence is wrong only near the place where
a block was cut, so in the middle of the overlap of two blocks both have the right tokens, and the
stream goes over from one block to the next at a token boundary there. The overlap is widened
until the two agree (and until the boundary lies before whitespace, if some is near); where they
never agree, the blocks grow together, in the worst case into the whole text.

That needs the character offsets of a fast tokenizer. A slow one gets each document whole.

The tokenizer adds no special token: what stands in front of a text is said by the BOS rule.
Special tokens spelled out in the text are recognised, as tokenizer(text) does by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vllm.score.errors import ScoreModeError

BLOCK = 1 << 18  # characters tokenised at a time
OVERLAP = 4096  # characters tokenised twice
_WIDEST_FOR_WHITESPACE = 8  # times OVERLAP: wider only for want of agreement
_AGREEING_TOKENS = 8


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of one document.

    texts: for each token the characters it adds; together they are `text` exactly. A character
        made of several tokens stands with the first, what the tokenizer drops (a stripped space)
        with the token after it. None where the tokenizer gives no offsets, or there is no text.
    text: the characters of the chunk; None where there are only token ids.
    """

    document: int
    ids: list[int]
    texts: list[str] | None
    text: str | None


@dataclass(frozen=True)
class _Block:
    """The tokens of one block; starts and ends are positions in the document."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def inside(self, low: int, high: int) -> tuple[int, int]:
        """First and last + 1 index of the tokens that lie within [low, high]."""
        first = next((i for i, s in enumerate(self.starts) if s >= low), len(self.ids))
        last = len(self.ids)
        while last > first and self.ends[last - 1] > high:
            last -= 1
        return first, last

    def tokens(self, first: int, last: int) -> list[tuple[int, int, int]]:
        return list(
            zip(
                self.ids[first:last], self.starts[first:last], self.ends[first:last], strict=True
            )
        )


def tokenize_documents(
    tokenizer: Any,
    pieces: Iterable[tuple[int, str]],
    *,
    block: int = BLOCK,
    overlap: int = OVERLAP,
) -> Iterator[TokenChunk]:
    """The tokens of documents that arrive in pieces.

    Args:
        tokenizer: a Hugging Face tokenizer, or one with its `encode(text, add_special_tokens=)`.
        pieces: (document, text) pairs; the pieces of a document follow one another.
        block, overlap: characters; overlap at least 8 and less than half of block.

    Yields:
        at least one chunk a document, an empty one for an empty document. The chunks depend on
        the documents alone, not on how they were cut into pieces.

    Raises:
        ScoreModeError: for text that is no valid Unicode (a lone surrogate).
    """
    if not 8 <= overlap < block / 2:
        raise ScoreModeError(f"overlap is {overlap}; it must be from 8 to half of block ({block})")
    for document, texts in _by_document(pieces):
        if getattr(tokenizer, "is_fast", False):
            yield from _stream_document(tokenizer, document, texts, block, overlap)
        else:
            whole = _valid("".join(texts), document)
            ids = list(tokenizer.encode(whole, add_special_tokens=False)) if whole else []
            yield TokenChunk(document, ids, None, whole)


def limit_tokens(chunks: Iterable[TokenChunk], max_tokens: int | None) -> Iterator[TokenChunk]:
    """The chunks up to the first `max_tokens` tokens in all, the last one cut to fit."""
    left = max_tokens
    for chunk in chunks:
        if left is None or len(chunk.ids) <= left:
            yield chunk
            left = None if left is None else left - len(chunk.ids)
        else:
            texts = None if chunk.texts is None else chunk.texts[:left]
            text = chunk.text if texts is None else "".join(texts)
            if left:
                yield TokenChunk(chunk.document, chunk.ids[:left], texts, text)
            left = 0
        if left == 0:
            return


def _by_document(pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Iterator[str]]]:
    from itertools import groupby

    for document, group in groupby(pieces, key=lambda piece: piece[0]):
        yield document, (text for _, text in group)


def _stream_document(
    tokenizer: Any, document: int, pieces: Iterator[str], block: int, overlap: int
) -> Iterator[TokenChunk]:
    buffer = ""  # document[base : base + len(buffer)]
    base = emitted = 0  # positions in the document
    first = 0  # tokens of `current` that are already out
    current: _Block | None = None
    ended = False
    while True:
        wanted = block if current is None else max(block, 2 * len(buffer))
        buffer, ended = _fill(buffer, pieces, wanted, document)
        if current is None:
            current = _encode(tokenizer, buffer, base)
        if ended and current.ends[-1:] and len(buffer) <= wanted and _covers(current, base, buffer):
            pass
        if ended:
            current, first = _last_block(tokenizer, buffer, base, emitted, current, first)
        raise NotImplementedError
