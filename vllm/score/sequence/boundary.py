"""Tokens of a context and its continuation, and the place where the continuation begins.

Both are tokenised together, as the model would read them, and cut where the context ends. A token
may hold the end of the context and the beginning of the continuation at once; the rule says what
then:

``spanning``  score from the start of that token on, and say so
``strict``    refuse
``separate``  tokenise the two apart, so that no token can; the tokens need not be those that the
              tokenizer makes of the whole text
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.sequence.joint import Joint, JointEncoder
from vllm.score.sequence.offsets import Cut, find_cut
from vllm.score.tokens import automatic_prefix, begins_with_prefix

RULES = ("spanning", "strict", "separate")
# Texts are tokenised together as long as their offsets take little memory.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Pair:
    """One continuation of one context.

    Attributes:
        context: may be empty.
        continuation: may not.
        templated: the context came from a chat template, which writes special tokens itself.
        name: for errors.
    """

    context: str
    continuation: str
    templated: bool = False
    name: str = "pair"


@dataclass(frozen=True)
class SplitTokens:
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


class BoundaryTokenizer:
    """Splits pairs.

    Args:
        tokenizer: of Hugging Face or vLLM. Without offsets (a slow one), the cut is found by
            comparing with the tokens of the context alone.
        rule: one of `RULES`.

    Raises:
        ScoreModeError: for another rule.
    """

    def __init__(self, tokenizer: Any, rule: str = "spanning") -> None:
        if rule not in RULES:
            raise ScoreModeError(f"boundary is {rule!r}; it must be one of {', '.join(RULES)}.")
        self._tokenizer, self._rule = tokenizer, rule
        backend = getattr(tokenizer, "backend_tokenizer", None)
        fast = bool(getattr(tokenizer, "is_fast", False)) and backend is not None
        self._joint = JointEncoder(tokenizer) if fast and rule != "separate" else None
        normalizer = getattr(backend, "normalizer", None)
        self._normalize = None if normalizer is None else normalizer.normalize_str
        self._prefix = automatic_prefix(tokenizer)
        self._last_context: tuple[str, list[int]] = ("", [])

    def split(self, pairs: Iterable[Pair]) -> Iterator[SplitTokens]:
        """One `SplitTokens` a pair, in order.

        The tokens are those of context + continuation, behind the special tokens that
        tokenizer(text) puts in front of any text (unless the context has them, or a chat template
        wrote it). If the continuation's tokens would still be the first, BOS comes before them,
        or EOS where there is no BOS.

        Raises:
            ScoreModeError: an empty continuation, one without a token of its own, a text without
                UTF-8 form, nothing to put before an empty context, or (rule "strict") a token
                that spans the boundary. The message begins with the pair's name.
        """
        for batch in _batches(pairs):
            for pair in batch:
                _check(pair)
            if self._joint is not None:
                yield from self._by_offsets(batch, self._joint)
            else:
                for pair in batch:
                    ids, start, spanned = (
                        self._apart(pair) if self._rule == "separate" else self._by_comparison(pair)
                    )
                    yield self._finish(pair, ids, start, spanned)

    def _by_offsets(self, batch: Sequence[Pair], encoder: JointEncoder) -> Iterator[SplitTokens]:
        joints = encoder.encode([(pair.context, pair.continuation) for pair in batch])
        for pair, joint in zip(batch, joints, strict=True):
            found = self._find(pair, joint)
            spanned = pair.context[found.start :] if found.start < len(pair.context) else None
            yield self._finish(pair, joint.ids, found.index, spanned)

    def _find(self, pair: Pair, joint: Joint) -> Cut:
        def token(index: int) -> str:
            return str(self._tokenizer.convert_ids_to_tokens(joint.ids[joint.first + index]))

        text = pair.context[joint.begin :] + pair.continuation
        length = len(pair.context) - joint.begin
        found = find_cut(token, joint.offsets, text, length, self._normalize)
        if found is None:
            raise _vanished(pair)
        return Cut(joint.first + found.index, joint.begin + found.start)

    def _apart(self, pair: Pair) -> tuple[list[int], int, None]:
        context, own = self._encode_context(pair.context), self._encode(pair.continuation)
        if not own:
            raise _vanished(pair)
        return context + own, len(context), None

    def _by_comparison(self, pair: Pair) -> tuple[list[int], int, str | None]:
        """Tokens that the context alone has, too, are the context's; so are further ones, as far
        as they decode to its characters."""
        text = pair.context + pair.continuation
        alone, ids = self._encode_context(pair.context), self._encode(text)
        if not ids or ids == alone:
            raise _vanished(pair)
        differing = (i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b)
        start = min(next(differing, len(alone)), len(ids) - 1)
        if self._decode(ids) == text:
            return (ids, *self._by_decoding(pair.context, ids, start))
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        swallows = start and ids[start - 1] == unknown and not pair.continuation[0].isspace()
        if start == len(alone) and swallows:
            start -= 1  # may stand for characters from both sides
        return ids, start, self._decode(alone[start:]) if start < len(alone) else None

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
            raise ScoreModeError(
                f"{pair.name}: the token {token!r} holds both the end of the context, "
                f"{spanned!r}, and the beginning of the continuation "
                f"{pair.continuation[:40]!r}; move the boundary (a space usually belongs to the "
                "continuation), or use boundary='spanning' or 'separate'."
            )
        prefix = [] if pair.templated else self._prefix
        if start and begins_with_prefix(ids, prefix):
            prefix = []  # the context brings its own
        if not prefix and start == 0:
            prefix = [self._start_token(pair)]
        return SplitTokens([*prefix, *ids], start + len(prefix), spanned is not None, spanned or "")

    def _start_token(self, pair: Pair) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self._tokenizer, name, None)
            if token is not None:
                return int(token)
        raise ScoreModeError(
            f"{pair.name}: nothing stands before the first token of the continuation, and the "
            "tokenizer has no BOS or EOS token to put there; give a context."
        )

    def _encode_context(self, context: str) -> list[int]:
        if context != self._last_context[0]:
            self._last_context = (context, self._encode(context))
        return self._last_context[1]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _check(pair: Pair) -> None:
    if not pair.continuation:
        raise ScoreModeError(
            f"{pair.name}: the continuation is empty; give at least one character."
        )
    for what, text in (("context", pair.context), ("continuation", pair.continuation)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ScoreModeError(
                f"{pair.name}: the {what} has a lone surrogate ({text[error.start]!r}), which is "
                "no character and has no UTF-8 form; remove or replace it."
            ) from None


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
