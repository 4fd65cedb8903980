"""Tokens of a context and its continuation, and the place where the continuation begins.

Both are tokenised together, as the model would read them, and cut where the context ends. A token
may hold the end of the context and the beginning of the continuation at once; the rule says what
then:

``spanning``  score from the start of that token on, and say so
``strict``    refuse
``separate``  tokenise the two apart, so that no token can; the tokens need not be those that the
              tokenizer makes of the whole text

What a token holds is known from its bytes where the vocabulary writes them out, else from the
offsets of the tokenizer, else by comparison with the tokens of the context alone
(`vllm.score.sequence.alignment`).

A space that the tokenizer itself puts before a text (sentencepiece's "dummy prefix") is no context:
it belongs to what it stands before. So without a context all tokens of the text are the
continuation's, behind BOS or EOS; and a continuation tokenised apart gets no such space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

from vllm.score.checks import check_name
from vllm.score.data.tokenize import TokenBytes
from vllm.score.errors import ScoreModeError
from vllm.score.sequence.alignment import Tokens, find_cut
from vllm.score.sequence.joint import Joint, JointEncoder
from vllm.score.tokens import (
    automatic_prefix,
    begins_with_prefix,
    check_encodable,
    own_prefix_length,
)

RULES = ("spanning", "strict", "separate")
# Put before a text where the tokenizer's own space cannot be switched off. The first is in hardly
# any vocabulary and becomes bytes, which never merge with others; the rest is for vocabularies
# without bytes.
_ANCHORS = ("\ue000", "\n", ".", "|", "0", "a")
# Texts are tokenised together as long as their offsets take little memory.
_BATCH_CHARACTERS = 1 << 20


class Pair(NamedTuple):
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
        self._encode_context = lru_cache(maxsize=1)(partial(_encode, tokenizer))
        self._bytes = TokenBytes(tokenizer)
        self._joint = JointEncoder(tokenizer)
        self._apart = ApartEncoder(tokenizer, self._bytes) if rule == "separate" else None
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalize = getattr(normalizer, "normalize_str", None)
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
                yield from (self._encode_apart(pair, self._apart) for pair in batch)
            else:
                texts = [(pair.context, pair.continuation) for pair in batch]
                yield from map(self._cut, batch, self._joint.encode(texts))

    def _encode_apart(self, pair: Pair, encoder: ApartEncoder) -> SplitTokens:
        context = self._encode_context(pair.context)
        own = encoder.encode(pair, context)
        if not own:
            raise _vanished(pair)
        return self._finish(pair, context + own, len(context), None)

    def _cut(self, pair: Pair, joint: Joint) -> SplitTokens:
        text = pair.context[joint.begin :] + pair.continuation
        length = len(pair.context) - joint.begin
        own = Tokens(joint.ids[joint.first :], joint.first == 0, joint.offsets)
        found = find_cut(self._bytes, own, text, length, self._normalize)
        if found is None:
            if joint.offsets:
                raise _vanished(pair)
            return self._finish(pair, joint.ids, *self._by_comparison(pair, joint.ids))
        # Before the first character of all, only a space of the tokenizer's own can be left.
        index = joint.first + found.token if pair.context else 0
        start = joint.begin + found.start
        return self._finish(pair, joint.ids, index, pair.context[start:] or None)

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
            token = self._text_of(ids[start])
            raise ScoreModeError(
                f"{pair.name}: the token {token!r} holds both the end of the context, "
                f"{spanned!r}, and the beginning of the continuation "
                f"{pair.continuation[:40]!r}; move the boundary (a space usually belongs to the "
                "continuation), or use boundary='spanning' or 'separate'."
            )
        prefix = [] if pair.templated else self._prefix
        if start == 0 and not prefix:
            prefix = [self._start_token(pair)]
        own = own_prefix_length(ids, prefix)
        written = begins_with_prefix(ids, prefix) and self._writes(pair, prefix[:1])
        if written and (start >= own or (not pair.context and len(ids) > own)):
            prefix, start = [], max(start, own)
        start += len(prefix)
        return SplitTokens([*prefix, *ids], start, spanned is not None, spanned or "")

    def _writes(self, pair: Pair, first: list[int]) -> bool:
        """Whether the text begins with the token as it is written, and not only with its id."""
        text = (pair.context or pair.continuation).lstrip()
        return text.startswith(self._decode(first).strip())

    def _start_token(self, pair: Pair) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self._tokenizer, name, None)
            if token is not None:
                return int(token)
        raise ScoreModeError(
            f"{pair.name}: nothing stands before the first token of the continuation, and the "
            "tokenizer has no BOS or EOS token to put there; give a context."
        )

    def _text_of(self, token: int) -> str:
        if self._bytes.known:
            return self._bytes(token).decode(errors="replace")
        return self._decode([token])

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


class ApartEncoder:
    """Tokenises texts without the space that many tokenizers put before a text.

    Args:
        tokenizer: of Hugging Face or vLLM.
    """

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self._tokenizer, self._bytes = tokenizer, token_bytes
        self._encode = partial(_encode, tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._bare: Any = None
        if token_bytes.dummy and backend is not None:
            bare = _without_dummy(backend)
            first = bare.encode("a", add_special_tokens=False).ids[:1]
            if not any(token_bytes(token).startswith(b" ") for token in first):
                self._bare = bare

    def encode(self, pair: Pair, context_ids: list[int]) -> list[int]:
        """Token ids of the continuation.

        Without a context it begins with the tokenizer's space; behind a special token it may, as
        the tokenizer has it.

        Args:
            context_ids: tokens of the context.

        Raises:
            ScoreModeError: the tokenizer's space cannot be kept away.
        """
        text = pair.continuation
        if not self._bytes.dummy or not context_ids:
            return self._encode(text)
        special = self._bytes.added.get(context_ids[-1])
        if special is not None and pair.context.rstrip().endswith(special.content):
            behind = self._encode(special.content + text)
            if behind[:1] == context_ids[-1:]:
                return behind[1:]
        return self._behind_anchor(pair) if self._bare is None else self._bare_ids(text)

    def _bare_ids(self, text: str) -> list[int]:
        """Behind a special token inside of the text, the tokenizer's own reading stands."""
        found = self._bare.encode(text, add_special_tokens=False)
        for index, (token, (start, end)) in enumerate(zip(found.ids, found.offsets, strict=True)):
            added = self._bytes.added.get(token)
            if added is not None and text[start:end].strip() == added.content:
                return [*found.ids[:index], *self._encode(text[start:])]
        return list(found.ids)

    def _behind_anchor(self, pair: Pair) -> list[int]:
        """A text that merges with the anchor shows: the anchor's own tokens are gone."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        for anchor in _ANCHORS:
            alone, both = self._encode(anchor), self._encode(anchor + pair.continuation)
            if alone and alone[-1] != unknown and both[: len(alone)] == alone:
                return both[len(alone) :]
        raise ScoreModeError(
            f"{pair.name}: boundary='separate' does not work with this tokenizer "
            f"({type(self._tokenizer).__name__}), which puts a space that cannot be kept away "
            f"before the continuation {pair.continuation[:40]!r}; use boundary='spanning'."
        )


def _without_dummy(backend: Any) -> Any:
    """A copy of a fast tokenizer that puts no space before a text."""
    settings = json.loads(backend.to_str())
    for step in ("normalizer", "pre_tokenizer"):
        settings[step] = _stripped(settings[step])
    copy = type(backend).from_str(json.dumps(settings))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _stripped(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer, as `tokenizers` writes it, without what adds the space."""
    kind = None if step is None else step["type"]
    if step is None or kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    parts: dict[str, Any] = {
        key: [part for part in map(_stripped, step[key]) if part is not None]
        for key in ("normalizers", "pretokenizers")
        if key in step
    }
    return {**step, **parts}


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


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
