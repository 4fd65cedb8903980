"""Tokens of a context and its continuation, and the place where the continuation begins.

Both are tokenised together, as the model would read them, and cut where the context ends. A token
may hold the end of the context and the beginning of the continuation at once; the rule says what
then:

``spanning``  score from the start of that token on, and say so
``strict``    refuse
``separate``  tokenise the two apart, so that no token can; the tokens need not be those that the
              tokenizer makes of the whole text

What a token holds is known from its bytes where the vocabulary writes them out, else from the
offsets of the tokenizer (`CutFinder`), else by comparison with the tokens of the context alone.

A space that the tokenizer itself puts before a text (sentencepiece's "dummy prefix") is no context:
it belongs to what it stands before. So without a context all tokens of the text are the
continuation's, behind BOS or EOS; and a continuation tokenised apart gets no such space.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from vllm.score.checks import check_name
from vllm.score.data.tokenize import TokenBytes
from vllm.score.errors import ScoreModeError
from vllm.score.sequence.encoding import ApartEncoder, JointEncoder, Pair, Tokens, encode
from vllm.score.tokens import automatic_prefix, check_encodable, own_prefix_length, start_token

RULES = ("spanning", "strict", "separate")
# Texts are tokenised together as long as their offsets take little memory.
_BATCH_CHARACTERS = 1 << 20
# Characters on each side of the cut that a normaliser may look at.
_WINDOW = 64


class SplitTokens(NamedTuple):
    """Tokens of context and continuation.

    Attributes:
        token_ids: [n], special tokens in front included.
        start: from 1 to n - 1; token_ids[start:] are the continuation.
        spans_boundary: token_ids[start] also holds the end of the context.
        spanned_context: the characters of the context, whole or in part, that it holds.
    """

    token_ids: list[int]
    start: int
    spans_boundary: bool = False
    spanned_context: str = ""

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """Token ids of the context and of the continuation."""
        return self.token_ids[: self.start], self.token_ids[self.start :]


class BoundaryTokenizer:
    """Splits pairs.

    Args:
        tokenizer: of Hugging Face or vLLM.
        rule: one of `RULES`.

    Raises:
        ScoreModeError: for another rule.
    """

    def __init__(self, tokenizer: Any, rule: str = "spanning") -> None:
        check_name("boundary", rule, RULES)
        self._tokenizer, self._rule = tokenizer, rule
        self._encode_context = lru_cache(maxsize=1)(partial(encode, tokenizer))
        self._bytes = TokenBytes(tokenizer)
        self._finder = CutFinder(tokenizer, self._bytes)
        self._joint = JointEncoder(tokenizer)
        self._apart = ApartEncoder(tokenizer, self._bytes) if rule == "separate" else None
        self._prefix = automatic_prefix(tokenizer)

    def split(self, pairs: Iterable[Pair]) -> Iterator[SplitTokens]:
        """One `SplitTokens` per pair, in order.

        The tokens are those of context + continuation, behind the special tokens that
        tokenizer(text) puts in front of any text (unless the context has them, or a chat template
        wrote it). If the continuation's tokens would still be the first, BOS comes before them,
        or EOS where there is no BOS. A continuation that begins with these special tokens itself
        is scored from behind them, unless it has nothing else.

        Raises:
            ScoreModeError: an empty continuation, one without a token of its own, a text without
                UTF-8 form, nothing to put before an empty context, (rule "strict") a token that
                spans the boundary, or (rule "separate") a tokenizer whose own space cannot be kept
                away. The message begins with the pair's name.
        """
        for batch in _batches(pairs):
            for pair in batch:
                if not pair.continuation:
                    raise ScoreModeError(
                        f"{pair.name}: the continuation is empty; give at least one character."
                    )
                check_encodable(pair.context, f"{pair.name}: the context")
                check_encodable(pair.continuation, f"{pair.name}: the continuation")
            if self._apart is not None:
                yield from map(self._join, batch, map(self._apart.encode, batch))
            else:
                texts = [(pair.context, pair.continuation) for pair in batch]
                yield from map(self._cut, batch, self._joint.encode(texts))

    def _join(self, pair: Pair, parts: tuple[list[int], list[int]]) -> SplitTokens:
        context, own = parts
        if not own:
            raise _vanished(pair)
        return self._finish(pair, context + own, len(context), None)

    def _cut(self, pair: Pair, tokens: Tokens) -> SplitTokens:
        ids = [*tokens.before, *tokens.ids]
        text = pair.context[tokens.begin :] + pair.continuation
        found = self._finder.find(tokens, text, len(pair.context) - tokens.begin)
        if found is None:
            if tokens.offsets:
                raise _vanished(pair)
            return self._finish(pair, ids, *self._by_comparison(pair, ids))
        # Before the first character of all, only a space of the tokenizer's own can be left.
        index = len(tokens.before) + found.token if pair.context else 0
        return self._finish(pair, ids, index, pair.context[tokens.begin + found.start :] or None)

    def _by_comparison(self, pair: Pair, ids: list[int]) -> tuple[int, str | None]:
        """(first token of the continuation, what it holds of the context).

        Tokens that the context alone has, too, are the context's; so are further ones, as far as
        they decode to its characters.
        """
        alone = self._encode_context(pair.context)
        if not ids or ids == alone:
            raise _vanished(pair)
        differing = (i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b)
        start = min(next(differing, len(alone)), len(ids) - 1)
        if self._decode(ids) == pair.context + pair.continuation:
            return self._by_decoding(pair.context, ids, start)
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        swallows = start and ids[start - 1] == unknown and not pair.continuation[0].isspace()
        if start == len(alone) and swallows:
            start -= 1  # may stand for characters from both sides
        return start, self._decode(alone[start:]) if start < len(alone) else None

    def _by_decoding(self, context: str, ids: list[int], start: int) -> tuple[int, str | None]:
        whole = start  # tokens that end between characters
        while not context.startswith(head := self._decode(ids[:whole])):
            whole -= 1
        for index in range(start + 1, len(ids)):
            decoded = self._decode(ids[:index])
            if len(decoded) > len(context) + 4:  # a cut character can decode to four of U+FFFD
                break
            if len(decoded) > len(head) and context.startswith(decoded):
                start, head = index, decoded
        return start, context[len(head) :] if len(head) < len(context) else None

    def _finish(self, pair: Pair, ids: list[int], start: int, spanned: str | None) -> SplitTokens:
        if spanned is not None and self._rule == "strict":
            token = self._decode(ids[start : start + 1])
            if self._bytes.known:
                token = self._bytes(ids[start]).decode(errors="replace")
            raise ScoreModeError(
                f"{pair.name}: the token {token!r} holds both the end of the context, "
                f"{spanned!r}, and the beginning of the continuation "
                f"{pair.continuation[:40]!r}; move the boundary (a space usually belongs to the "
                "continuation), or use boundary='spanning' or 'separate'."
            )
        prefix = [] if pair.templated else self._prefix
        if start == 0 and not prefix:
            first = start_token(self._tokenizer)
            if first is None:
                raise ScoreModeError(
                    f"{pair.name}: nothing stands before the first token of the continuation, and "
                    "the tokenizer has no BOS or EOS token to put there; give a context."
                )
            prefix = [first]
        own = own_prefix_length(ids, prefix)
        text = (pair.context or pair.continuation).lstrip()
        # As it is written, and not only by its id.
        written = own > 0 and text.startswith(self._decode(prefix[:1]).strip())
        if written and (start >= own or (not pair.context and len(ids) > own)):
            prefix, start = [], max(start, own)
        start += len(prefix)
        return SplitTokens([*prefix, *ids], start, spanned is not None, spanned or "")

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


class Cut(NamedTuple):
    """The place of the first token of a continuation.

    Attributes:
        token: index of it.
        start: where its text starts; before the cut if it also holds the end of the context.
    """

    token: int
    start: int


class CutFinder:
    """Finds the first token of a continuation, by the bytes of the text's tokens or their offsets.

    The tokens of a text, put together, are its bytes, but for the spaces that a tokenizer adds
    before the text and behind a special token. So the tokens are followed back from the end of the
    text to the cut. Where their bytes are not the text's (an unknown token, a normaliser that
    changes the text), the offsets of a fast tokenizer say where a token's characters stand, even
    if it writes them in another way or not at all.

    A normaliser may compose a character from both sides of the cut (e + U+0301 to é), and the
    offsets name only one of them; then the cut goes to the beginning of that character.

    Args:
        tokenizer: of Hugging Face or vLLM.
    """

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalize: Callable[[str], str] | None = getattr(normalizer, "normalize_str", None)

    def find(self, tokens: Tokens, text: str, cut: int) -> Cut | None:
        """The first token that holds anything of text[cut:].

        A space that the tokenizer adds counts to what follows it. A character that a normaliser
        composes from both sides of the cut is the continuation's, with all its marks.

        Args:
            text: context and continuation, from `tokens.begin` on.
            cut: length of the context in it.

        Returns:
            None if no token holds anything of it, or neither bytes nor offsets tell.
        """
        found = self._by_bytes(tokens, text, cut) if self._bytes.known else None
        return found or self._by_offsets(tokens.offsets, text, cut)

    def _by_bytes(self, tokens: Tokens, text: str, cut: int) -> Cut | None:
        if found := self._walk(tokens, text, cut):
            return found
        if self._normalize is None or not tokens.offsets:
            return None
        begin = self._composed_from(text, cut)
        changed, context = self._normalize(text), self._normalize(text[:begin])
        if not changed.startswith(context):
            return None
        found = self._walk(tokens._replace(offsets=()), changed, len(context))
        if found is None:
            return None
        spans = found.start < len(context)
        start = min(tokens.offsets[found.token][0], begin - 1) if spans else begin
        return Cut(found.token, start)

    def _by_offsets(self, offsets: Sequence[tuple[int, int]], text: str, cut: int) -> Cut | None:
        begin = self._composed_from(text, cut)
        index = len(offsets)
        while index and offsets[index - 1][1] > begin:
            index -= 1
        return Cut(index, min(offsets[index][0], begin)) if index < len(offsets) else None

    def _composed_from(self, text: str, cut: int) -> int:
        """Where the character starts, with its marks, that is composed from both sides of the cut;
        the cut itself if none is."""
        near = max(0, cut - _WINDOW)
        around, before = text[near : cut + _WINDOW], text[near:cut]
        if self._normalize is None or self._normalize(around).startswith(self._normalize(before)):
            return cut
        begin = max(0, cut - 1)
        while begin and unicodedata.combining(text[begin]):
            begin -= 1
        return begin

    def _walk(self, tokens: Tokens, text: str, cut: int) -> Cut | None:
        """By bytes, as far as they are the text's; a character that is cut counts as a whole."""
        written = self._bytes.of_text(text)
        end = len(self._bytes.of_text(text[:cut]))
        index, position = len(tokens.ids), len(written)
        for before, start in self._backwards(tokens, text, written):
            if position < end or start < position == end:
                break
            index, position = before, start
        if position > end or index == len(tokens.ids):
            return None
        while written[position] & 0xC0 == 0x80:  # inside of a character
            position -= 1
        return Cut(index, cut - len(written[position:end].decode()))

    def _backwards(self, tokens: Tokens, text: str, written: bytes) -> Iterator[tuple[int, int]]:
        """(index, where its bytes start in `written`) from the last token on, as far as they
        agree."""
        ids, offsets, position = tokens.ids, tokens.offsets, len(written)
        greedy, added = self._bytes.greedy, self._bytes.added

        def place(character: int) -> int:
            return len(self._bytes.of_text(text[:character]))

        for index in reversed(range(len(ids))):
            before = ids[index - 1] if index else None
            if not offsets and not greedy.isdisjoint((ids[index], before)):
                return
            if ids[index] in greedy:
                position = place(offsets[index][0])
                yield index, position
                continue
            low = place(offsets[index - 1][1]) if before in greedy else 0
            piece = self._bytes(ids[index])
            begins = not tokens.before if before is None else before in added
            pieces = (piece, piece[1:]) if begins and piece.startswith(b" ") else (piece,)
            fitting = (each for each in pieces if written.endswith(each, low, position))
            if (found := next(fitting, None)) is None:
                return
            position -= len(found)
            yield index, position


def _vanished(pair: Pair) -> ScoreModeError:
    return ScoreModeError(
        f"{pair.name}: the tokenizer leaves no token of the continuation "
        f"{pair.continuation[:40]!r} behind this context; give one that it does not drop."
    )


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair.context) + len(pair.continuation)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
