"""Tokens of documents that arrive in pieces, as if each document were tokenised at once.

The tokenizer adds no special token: what stands in front of a text is said by the BOS rule.
Special tokens spelled out in the text are recognised, as tokenizer(text) does by default.

A document of a fast tokenizer is tokenised in overlapping blocks, so it need not fit in memory. A
block's tokens are wrong only near the places where it was cut out of the text. So the stream goes
over from one block to the next at a token boundary in the middle half of the overlap where
whitespace follows, if both have the same tokens all around it. Otherwise the overlap is widened,
and at last both are tokenised as one block, which grows to the whole text if it must: inside a very
long word, tokens can depend on its far end.

Whole documents are needed by a slow tokenizer, which gives no offsets, and by a unigram model that
does not split at spaces.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

from vllm.score.tokens import check_encodable

BLOCK = 1 << 18
OVERLAP = 4096
_AGREEING_TOKENS = 8  # fewer in the overlap prove nothing
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + rank): byte for rank, byte in enumerate(_OTHERS)
}
_SPACES = ("▁", "Ġ")

Token = tuple[int, int, int]  # (id, start, end): its characters in the text
# text -> token ids, and for each its (start, end) in characters
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of one document.

    texts: for each token the characters it adds; put together they are `text`. A character made
        of several tokens stands with the first; what the tokenizer drops (a stripped space)
        stands with the token after it. None where the tokenizer gives no offsets.
    text: the characters of the chunk; None where there are only token ids.
    """

    document: int
    ids: list[int]
    texts: list[str] | None
    text: str | None


def tokenize_documents(
    tokenizer: Any, pieces: Iterable[tuple[int, str]], *, block: int = BLOCK, overlap: int = OVERLAP
) -> Iterator[TokenChunk]:
    """Tokenise documents.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with `encode(text, add_special_tokens=)`.
        pieces: (document, text) pairs; the pieces of a document follow one another.
        block: characters tokenised at a time.
        overlap: characters tokenised twice, at least 32 and less than half of block.

    Yields:
        at least one chunk per document, an empty one for an empty document. The chunks depend on
        the documents alone, not on how they were cut into pieces.

    Raises:
        ScoreModeError: for text that cannot be encoded in UTF-8 (a lone surrogate).
    """
    gives_offsets = getattr(tokenizer, "backend_tokenizer", None) is not None
    encode = _offset_encoder(tokenizer) if gives_offsets else None
    separators = _separators(tokenizer) if gives_offsets else None
    size = sys.maxsize if separators is None else block
    for document, group in groupby(pieces, key=lambda piece: piece[0]):
        texts = _encodable(group)
        if encode is None:
            whole = "".join(texts)
            whole_ids = list(tokenizer.encode(whole, add_special_tokens=False)) if whole else []
            yield TokenChunk(document, whole_ids, None, whole)
            continue
        stream = _BlockStream(document, encode, texts, size, overlap, separators or "")
        yield from stream.chunks()


def limit_tokens(chunks: Iterable[TokenChunk], max_tokens: int) -> Iterator[TokenChunk]:
    """The chunks up to the first `max_tokens` tokens in all, the last one cut to fit."""
    left = max_tokens
    for chunk in chunks:
        if len(chunk.ids) >= left:
            texts = None if chunk.texts is None else chunk.texts[:left]
            text = chunk.text if texts is None else "".join(texts)
            yield TokenChunk(chunk.document, chunk.ids[:left], texts, text)
            return
        yield chunk
        left -= len(chunk.ids)


def tokens_within(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], low: int, high: int
) -> list[Token]:
    """The tokens that lie in text[low:high].

    Args:
        ids, offsets: [n], (start, end) of each token, in the order of the text.
    """
    first, last = bisect_left(offsets, (low, 0)), bisect_left(offsets, (high, 0))
    rows = zip(ids[first:last], offsets[first:last], strict=True)
    return [(token, start, end) for token, (start, end) in rows if start >= low and end <= high]


def place_to_go_over(
    agreed: Sequence[Token], text: str, middle: float, separators: str = "", base: int = 0
) -> int | None:
    """Where to go over from one tokenisation to another that has the same tokens around there.

    Args:
        agreed: the tokens that both have.
        middle: the place that is nearest to this one is best.
        separators: whitespace before which words end; "" for any whitespace.
        base: position of text[0]; the tokens' positions and `middle` count as it does.

    Returns:
        the start of a token that begins with white space after a word; None where there is none, or
        fewer than 8 tokens agree.
    """

    def word_ends(position: int) -> bool:
        before, after = text[position - base - 1], text[position - base]
        return (after in separators if separators else after.isspace()) and not before.isspace()

    if len(agreed) < _AGREEING_TOKENS:
        return None
    places = [
        start
        for (_, before, end), (_, start, after) in pairwise(agreed)
        if before < start < after and end <= start and word_ends(end)
    ]
    return min(places, key=lambda place: abs(place - middle), default=None)


@dataclass(frozen=True)
class _Block:
    """Tokens of text[begin:end]; offsets are positions in the whole text."""

    begin: int
    end: int
    ids: list[int]
    offsets: list[tuple[int, int]]

    def index(self, position: int) -> int:
        """Of the first token that starts there or later."""
        return bisect_left(self.offsets, (position, 0))

    def boundary(self, at_most: int) -> int:
        """The last position <= at_most where a token starts; the block's begin if there is none."""
        index = self.index(at_most + 1) - 1
        return self.offsets[index][0] if index >= 0 else self.begin


@dataclass
class _BlockStream:
    """The tokens of one document.

    encode: tokenises a piece of text.
    pieces: the text, cut anyhow.
    block, overlap: in characters.
    separators: whitespace before which words end; "" for any whitespace.
    """

    document: int
    encode: Encode
    pieces: Iterator[str]
    block: int
    overlap: int
    separators: str
    _pending: str = ""  # read from the pieces, not yet in the buffer
    _text: str = ""  # the text from self._base on, as far as it has been read
    _base: int = 0
    _written: int = 0  # characters already given out with a token

    def chunks(self) -> Iterator[TokenChunk]:
        """At least one."""
        amount = self.block
        self._read(amount)
        current = self._tokenize(0)
        first = 0  # index of the first token of `current` not yet given out
        while self._read(amount):
            cut, following = self._go_over(current)
            if cut is None:
                first = following.index(current.offsets[first][0]) if first else 0
                amount *= 2
            else:
                yield self._give_out(current, first, current.index(cut))
                first = following.index(cut)
                amount = self.block
                self._text = self._text[following.begin - self._base :]
                self._base = following.begin
            current = following
        yield self._give_out(current, first, None)

    def _go_over(self, current: _Block) -> tuple[int | None, _Block]:
        """The next block and the position where to go over to it; None: it replaces `current`."""
        width = self.overlap
        while (start := current.boundary(current.end - width)) > max(current.begin, self._written):
            following = self._tokenize(start)
            low, high = start + width // 4, current.end - width // 4
            agreed = tokens_within(current.ids, current.offsets, low, high)
            if agreed == tokens_within(following.ids, following.offsets, low, high):
                middle = (low + high) / 2
                cut = place_to_go_over(agreed, self._text, middle, self.separators, self._base)
                if cut is not None:
                    return cut, following
            width *= 2
        return None, self._tokenize(current.begin)

    def _tokenize(self, start: int) -> _Block:
        """The block from `start` to as far as the text has been read."""
        ids, offsets = self.encode(self._text[start - self._base :])
        moved = [(start + begin, start + end) for begin, end in offsets]
        return _Block(start, self._base + len(self._text), ids, moved)

    def _give_out(self, block: _Block, first: int, last: int | None) -> TokenChunk:
        """Tokens first to last, None: to the end of the text."""
        begin, texts = self._written, []
        for _, end in block.offsets[first:last]:
            end = max(end, self._written)
            texts.append(self._text[self._written - self._base : end - self._base])
            self._written = end
        if last is None and self._written < block.end:
            rest = self._text[self._written - self._base :]
            self._written = block.end
            if texts:
                texts[-1] += rest
        text = self._text[begin - self._base : self._written - self._base]
        return TokenChunk(self.document, block.ids[first:last], texts, text)

    def _read(self, amount: int) -> bool:
        """Read `amount` more characters, or as many as there are; whether there was one."""
        parts, size = [self._pending], len(self._pending)
        while size < amount and (piece := next(self.pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        joined = "".join(parts)
        self._text += joined[:amount]
        self._pending = joined[amount:]
        return bool(joined)


def _encodable(pieces: Iterable[tuple[int, str]]) -> Iterator[str]:
    for document, text in pieces:
        check_encodable(text, f"document {document}")
        yield text


def _is_unigram(tokenizer: Any) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"


def _separators(tokenizer: Any) -> str | None:
    """Before which whitespace a text can be cut ("": any); None: nowhere.

    BPE and word pieces go by ranks, which say the same wherever a word stands. A unigram model
    adds up float64 scores from the beginning of a word, and a tie can fall either way with the
    rounding, so that only whole words will do: those its pre-tokenizer makes.
    """
    if not _is_unigram(tokenizer):
        return ""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    words = pre_tokenizer and pre_tokenizer.pre_tokenize_str("a b")
    return " " if words and len(words) > 1 else None


def _offset_encoder(tokenizer: Any) -> Encode:
    token_bytes = TokenBytes(tokenizer) if _is_unigram(tokenizer) else None

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning that a text is longer than the model
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        if token_bytes is not None and token_bytes.known:
            offsets = _own_offsets(token_bytes, text, ids, offsets)
        return ids, offsets

    return encode


class TokenBytes:
    """Token id to the bytes that it stands for, as the vocabulary writes them.

    Two spellings tell them exactly. sentencepiece writes ▁ for a space, and <0x41> for the byte
    0x41 where a character is not in the vocabulary. Byte-level vocabularies write every byte as one
    character (Radford et al. 2019: printable bytes as themselves, the others from U+0100 on), so
    that a space is Ġ.

    Args:
        tokenizer: of Hugging Face or vLLM.

    Attributes:
        known: whether the vocabulary tells the bytes; nothing else works where it does not.
        dummy: whether the tokenizer puts a space of its own before a text.
        added: tokens that are found in a text before it is tokenised, special ones above all; the
            text behind them is tokenised as if it began there.
        greedy: those of `added` that also swallow white space around them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes = cache(self._read)
        self.added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", None) or {})
        self.greedy = {i for i, token in self.added.items() if token.lstrip or token.rstrip}
        convert = getattr(tokenizer, "convert_ids_to_tokens", None)
        tokens = convert(tokenizer.encode("a a", add_special_tokens=False)) if convert else []
        spelled = "".join(token for token in tokens if isinstance(token, str))
        self._space = next((space for space in _SPACES if space in spelled), None)
        self.known = self._space is not None
        first = tokenizer.encode("a", add_special_tokens=False)[:1]
        self.dummy = self.known and any(self(token).startswith(b" ") for token in first)

    def __call__(self, token_id: int) -> bytes:
        return self._bytes(token_id)

    def of_text(self, text: str) -> bytes:
        """A text in the bytes that tokens write; to sentencepiece, ▁ and a space are the same."""
        return (text.replace("▁", " ") if self._space == "▁" else text).encode()

    def _read(self, token_id: int) -> bytes:
        if token_id in self.added:
            token = str(self.added[token_id].content)
        else:
            token = str(self._tokenizer.convert_ids_to_tokens([token_id])[0])
        if self._space == "▁":
            byte = _BYTE.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else self.of_text(token)
        if token_id in self.added or not _ALPHABET.keys() >= set(token):
            return token.encode()
        return bytes(_ALPHABET[character] for character in token)


def _own_offsets(
    token_bytes: TokenBytes, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Offsets in which every byte token has the character that it is a part of.

    A unigram model of Hugging Face gives each byte of a run of unknown characters the offsets of
    the whole run.

    Args:
        ids, offsets: [n], (start, end) of each token in `text`.
    """
    found: list[tuple[int, int]] = []
    for (start, end), run in groupby(zip(offsets, ids, strict=True), key=lambda row: row[0]):
        tokens = [token for _, token in run]
        characters = text[start:end]
        if 1 < end - start <= len(tokens) and (
            b"".join(map(token_bytes, tokens)) == characters.encode()
        ):
            for place, character in enumerate(characters, start):
                found += [(place, place + 1)] * len(character.encode())
        else:
            found += [(start, end)] * len(tokens)
    return found
