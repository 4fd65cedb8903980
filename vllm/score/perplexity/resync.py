"""Tokenising one long text block by block, with the tokens of the whole.

A block's tokens are wrong only near the places where it was cut out of the text. So blocks
overlap, and the stream goes over from one to the next at a token boundary in the middle half of
the overlap where whitespace follows, if both have the same tokens all around it. Otherwise the
overlap is widened, and at last both are tokenised as one block, which grows to the whole text if
it must: inside a very long word, tokens can depend on its far end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from vllm.score.errors import ScoreModeError

BLOCK = 1 << 18
OVERLAP = 4096
_AGREEING_TOKENS = 8  # fewer in the middle of the overlap prove nothing

# text -> token ids, and for each its (start, end) in characters
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True)
class _Block:
    """Tokens of text[begin:end]; starts and ends are positions in the whole text."""

    begin: int
    end: int
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def tokens(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """(id, start, end) of the tokens that lie within [low, high]."""
        rows = zip(self.ids, self.starts, self.ends, strict=True)
        return [row for row in rows if row[1] >= low and row[2] <= high]

    def boundary(self, at_most: int) -> int:
        """The last position <= at_most where a token starts; the block's begin if there is none."""
        index = bisect_left(self.starts, at_most + 1) - 1
        return self.starts[index] if index >= 0 else self.begin


class BlockStream:
    """The tokens of one text.

    Args:
        encode: tokenises a piece of text.
        pieces: the text, cut anyhow.
        block, overlap: in characters.
        separators: whitespace before which words end; "" for any whitespace.
    """

    def __init__(
        self,
        encode: Encode,
        pieces: Iterable[str],
        block: int = BLOCK,
        overlap: int = OVERLAP,
        separators: str = "",
    ) -> None:
        if not 32 <= overlap < block / 2:
            raise ScoreModeError(
                f"overlap is {overlap}; it must be at least 32 and less than half of block {block}"
            )
        self._encode = encode
        self._pieces = iter(pieces)
        self._block_size = block
        self._overlap = overlap
        self._separators = separators
        self._pending = ""  # read from the pieces, not yet in the buffer
        self._text = ""  # the text from self._base on, as far as it has been read
        self._base = 0
        self._written = 0  # characters already given out with a token

    def chunks(self) -> Iterator[tuple[list[int], list[str], str]]:
        """(token ids, the characters of each token, all characters), at least once."""
        self._read(self._block_size)
        current = self._tokenize(0)
        first = 0  # index of the first token of `current` not yet given out
        amount = self._block_size
        while self._read(amount):
            cut, following = self._go_over(current)
            if cut is None:
                first = bisect_left(following.starts, current.starts[first]) if first else 0
                amount *= 2
            else:
                last = bisect_left(current.starts, cut)
                yield self._give_out(current, first, last)
                first = bisect_left(following.starts, cut)
                amount = self._block_size
                self._forget(following.begin)
            current = following
        yield self._give_out(current, first, len(current.ids), to_the_end=True)

    def _go_over(self, current: _Block) -> tuple[int | None, _Block]:
        """The next block and the position where to go over to it; None: it replaces `current`."""
        width = self._overlap
        while (start := current.boundary(current.end - width)) > max(current.begin, self._written):
            following = self._tokenize(start)
            low, high = start + width // 4, current.end - width // 4
            cut = self._common_boundary(current, following, low, high)
            if cut is not None:
                return cut, following
            width *= 2
        return None, self._tokenize(current.begin)

    def _common_boundary(self, left: _Block, right: _Block, low: int, high: int) -> int | None:
        tokens = left.tokens(low, high)
        if len(tokens) < _AGREEING_TOKENS or tokens != right.tokens(low, high):
            return None
        middle = (low + high) / 2
        found = [
            start
            for (_, before_start, before_end), (_, start, end) in pairwise(tokens)
            if before_start < start < end and before_end <= start and self._word_ends(before_end)
        ]
        return min(found, key=lambda start: abs(start - middle), default=None)

    def _word_ends(self, position: int) -> bool:
        index = position - self._base
        before, after = self._text[index - 1], self._text[index]
        separates = after in self._separators if self._separators else after.isspace()
        return separates and not before.isspace()

    def _tokenize(self, start: int) -> _Block:
        """The block from `start` to as far as the text has been read."""
        ids, offsets = self._encode(self._text[start - self._base :])
        starts = [start + begin for begin, _ in offsets]
        ends = [start + end for _, end in offsets]
        return _Block(start, self._base + len(self._text), ids, starts, ends)

    def _give_out(
        self, block: _Block, first: int, last: int, *, to_the_end: bool = False
    ) -> tuple[list[int], list[str], str]:
        begin, texts = self._written, []
        for end in block.ends[first:last]:
            end = max(end, self._written)
            texts.append(self._text[self._written - self._base : end - self._base])
            self._written = end
        if to_the_end and self._written < block.end:
            rest = self._text[self._written - self._base :]
            self._written = block.end
            if texts:
                texts[-1] += rest
        text = self._text[begin - self._base : self._written - self._base]
        return block.ids[first:last], texts, text

    def _read(self, amount: int) -> bool:
        """Read `amount` more characters, or as many as there are; whether there was one."""
        parts, size = [self._pending], len(self._pending)
        while size < amount and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        joined = "".join(parts)
        self._text += joined[:amount]
        self._pending = joined[amount:]
        return bool(joined)

    def _forget(self, begin: int) -> None:
        self._text = self._text[begin - self._base :]
        self._base = begin
